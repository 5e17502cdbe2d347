"""`megatrain export` and `megatrain import`: a round trip changes no bit, and a run starts from an import."""

import json
import shutil

import pytest
import torch

from megatrain.config import ExportConfig, ImportConfig
from megatrain.errors import CheckpointError, ConfigError, EnvironmentFault
from megatrain.interop.load_model import load
from megatrain.tracking.metrics import read_metrics
from megatrain.verbs.export import export_
from megatrain.verbs.import_ import import_


@pytest.fixture
def imported(finished, tmp_path):
    """Export a finished run and import it again."""
    export_(ExportConfig(path=str(finished), out=str(tmp_path / "hf")))
    import_(ImportConfig(path=str(tmp_path / "hf"), out=str(tmp_path / "imported")))
    return tmp_path / "imported"


def test_a_round_trip_keeps_every_bit_the_shape_and_the_tokenizer(finished, imported):
    """It also leaves no other files behind."""
    assert sorted(path.name for path in imported.parent.iterdir()) == ["hf", "imported"]
    before, after = load(finished), load(imported)
    assert before.weights.keys() == after.weights.keys()
    for name, tensor in before.weights.items():
        assert torch.equal(tensor, after.weights[name]), name
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert after.config.num_kv_heads == before.config.num_kv_heads and after.config.vocab == before.config.vocab
    assert after.manifest.step == 0 and not any(name.startswith("optim.") for name in after.manifest.tensors)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_round_trip_of_either_family_keeps_every_bit(name, family, tmp_path):
    folder, config, model = family(name)
    export_(ExportConfig(path=str(folder), out=str(tmp_path / "hf")))
    import_(ImportConfig(path=str(tmp_path / "hf"), out=str(tmp_path / "imported")))
    after = load(tmp_path / "imported")
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, after.weights[key]), key
    assert after.config.position == config.position


def test_half_precision_is_widened_exactly(family, tmp_path):
    folder, _, model = family("llama")
    export_(ExportConfig(path=str(folder), out=str(tmp_path / "hf"), dtype="bf16"))
    import_(ImportConfig(path=str(tmp_path / "hf"), out=str(tmp_path / "imported")))
    after = load(tmp_path / "imported")
    assert {tensor.dtype for tensor in after.manifest.tensors.values()} == {"float32"}
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter.bfloat16().float(), after.weights[key]), key


def test_a_new_run_starts_from_an_imported_checkpoint(finished, imported, tmp_path, train_job):
    """The first loss is that of trained weights, not of random ones, and two steps train."""
    assert train_job(tmp_path / "runs", checkpoint__init_from=str(imported), train__steps=2) == 0
    fresh = read_metrics(finished / "metrics.jsonl")[0]["loss"]
    started = read_metrics(tmp_path / "runs" / "first" / "metrics.jsonl")
    assert [record["step"] for record in started] == [1, 2]
    assert started[0]["loss"] < fresh - 0.01
    assert all(record["updated"] for record in started)


def test_a_run_from_an_imported_checkpoint_hands_on_its_defaults_of_generation(finished, tmp_path, train_job):
    """Through training, a resume and a second run from the first; not where its ids belong to another tokenizer."""
    export_(ExportConfig(path=str(finished), out=str(tmp_path / "hf")))
    path = tmp_path / "hf" / "generation_config.json"
    given = {**json.loads(path.read_text()), "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    given["eos_token_id"] = [given["eos_token_id"], 7]
    path.write_text(json.dumps(given))
    import_(ImportConfig(path=str(tmp_path / "hf"), out=str(tmp_path / "imported")))
    start = {"checkpoint__init_from": str(tmp_path / "imported"), "train__steps": 2}
    assert train_job(tmp_path / "runs", **start) == 0
    assert train_job(tmp_path / "runs", **start | {"train__steps": 3}) == 0
    second = {"checkpoint__init_from": str(tmp_path / "runs" / "first"), "train__steps": 1}
    assert train_job(tmp_path / "second", **second) == 0
    assert train_job(tmp_path / "other", **second, checkpoint__override=["tokenizer"]) == 0

    def exported(run):
        out = tmp_path / f"from-{run}"
        export_(ExportConfig(path=str(tmp_path / run / "first"), out=str(out)))
        return json.loads((out / "generation_config.json").read_text())

    assert exported("runs") == given and exported("second") == given
    other = exported("other")
    assert (other["temperature"], other["eos_token_id"]) == (0.6, given["eos_token_id"][0])


def test_weights_alone_cannot_continue_a_run(imported, tmp_path, train_job):
    with pytest.raises(CheckpointError, match=r"checkpoint\.init_from"):
        train_job(tmp_path / "runs", checkpoint__resume=str(imported), train__steps=2)


def test_nothing_is_overwritten(finished, imported, tmp_path):
    for verb, config in (
        (export_, ExportConfig(path=str(finished), out=str(imported))),
        (import_, ImportConfig(path=str(tmp_path / "hf"), out=str(imported))),
    ):
        with pytest.raises(ConfigError, match="exists already"):
            verb(config)


def test_an_import_that_fails_leaves_nothing_behind(imported, tmp_path, monkeypatch):
    from megatrain.verbs import import_ as import_verb

    def full(*_):
        raise OSError(28, "No space left on device")

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(import_verb, "write", full)
    with pytest.raises(EnvironmentFault, match="No space left"):
        import_(ImportConfig(path=str(tmp_path / "hf"), out=str(tmp_path / "second")))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_is_not_from_hugging_face_is_refused(finished, imported, tmp_path):
    with pytest.raises(ConfigError, match="not a Hugging Face folder"):
        import_(ImportConfig(path=str(finished), out=str(tmp_path / "new")))
    with pytest.raises(ConfigError, match="is a Hugging Face folder already"):
        export_(ExportConfig(path=str(tmp_path / "hf"), out=str(tmp_path / "new")))


def test_a_folder_without_a_tokenizer_is_imported_with_a_warning(imported, tmp_path, capsys):
    bare = shutil.copytree(tmp_path / "hf", tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    import_(ImportConfig(path=str(bare), out=str(tmp_path / "new")))
    assert "without a tokenizer" in capsys.readouterr().err
    assert load(tmp_path / "new").tokenizer is None


def test_a_config_that_does_not_fit_the_weights_is_refused(imported, tmp_path):
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2"):
        import_(ImportConfig(path=str(tmp_path / "hf"), out=str(tmp_path / "new")))

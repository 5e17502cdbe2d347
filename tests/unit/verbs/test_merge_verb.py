"""`megatrain merge`: a merged checkpoint is used like any other, says what it was made from, and only equals merge."""

import json
import re
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from support.records import at

from megatrain import cli
from megatrain.checkpoint.manifest import Identity
from megatrain.checkpoint.store import write
from megatrain.config import ExportConfig, InspectConfig, MergeConfig, ModelConfig
from megatrain.errors import CheckpointError, ConfigError, EnvironmentFault
from megatrain.interop.load_model import load
from megatrain.model.init import build_model
from megatrain.tracking.metrics import read_metrics
from megatrain.verbs.export import export_
from megatrain.verbs.inspect import inspect
from megatrain.verbs.merge import merge

SHAPE = {"num_layers": 2, "num_heads": 2, "hidden_size": 32, "max_seq_len": 64, "init_std": 0.3}


@pytest.fixture
def make_model(tokenizer, tmp_path):
    """Return a function that saves a random model as a checkpoint: `make_model(name, seed, **shape)`."""

    def make(name, seed, spoil=None, with_tokenizer=True, loop=None, **shape):
        config = ModelConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size, **shape})
        folder = tmp_path / name
        folder.mkdir()
        if with_tokenizer:
            tokenizer.save(folder / "tokenizer")
        state = {f"model.{key}": value.detach() for key, value in build_model(config, seed=seed).named_parameters()}
        if spoil:
            state[spoil].view(-1)[3] = float("nan")
        write(folder, state, at(0, identity=Identity({"model": asdict(config), "train": loop or {}})), None)
        return folder

    return make


def merge_of(paths, out, **keys):
    keys = {"compare": False, **keys}
    merge(MergeConfig(paths=[str(path) for path in paths], out=str(out), **keys))
    return load(out)


@pytest.mark.parametrize("tied", [True, False])
def test_the_mean_of_two_models_is_a_checkpoint_that_exports(tied, make_model, tmp_path, capsys):
    """With a tied weight once, as in its sources; a Hugging Face folder merges as its checkpoint does."""
    a, b = make_model("a", 1, tie_embeddings=tied), make_model("b", 2, tie_embeddings=tied)
    export_(ExportConfig(path=str(b), out=str(tmp_path / "hf")))
    found = merge_of([a, b], tmp_path / "out", weights=[1.0, 3.0])
    same = merge_of([a, tmp_path / "hf"], tmp_path / "again", weights=[0.25, 0.75])
    first, second = load(a).weights, load(b).weights
    assert found.weights.keys() == first.keys() and ("head.weight" in found.weights) is not tied
    for name, tensor in found.weights.items():
        wanted = (first[name].double() + 3 * second[name].double()) / 4
        assert torch.allclose(tensor.double(), wanted, atol=1e-7), name
        assert torch.allclose(tensor, same.weights[name], atol=1e-7), name
    export_(ExportConfig(path=str(tmp_path / "out"), out=str(tmp_path / "exported")))
    assert load(tmp_path / "exported").tokenizer.fingerprint == load(a).tokenizer.fingerprint


def test_it_says_what_it_was_made_from(make_model, tmp_path, capsys):
    paths = [make_model("a", 1), make_model("b", 2)]
    found = merge_of(paths, tmp_path / "out", by="slerp", at=0.25)
    made = found.manifest.identity.made_from
    checksums = [json.loads((path / "manifest.json").read_text())["checksum"] for path in paths]
    assert made["by"] == "slerp" and made["at"] == 0.25
    assert [(s["path"], s["fingerprint"], s["weight"]) for s in made["sources"]] == [
        (str(paths[0]), checksums[0], 0.75),
        (str(paths[1]), checksums[1], 0.25),
    ]
    capsys.readouterr()
    inspect(InspectConfig(path=str(tmp_path / "out")))
    shown = capsys.readouterr().out
    assert "megatrain merge by=slerp at=0.25" in shown and checksums[1] in shown and "valid" in shown


def test_a_run_alone_is_averaged_over_its_checkpoints_with_losses_before_and_after(finished, tmp_path, capsys):
    """A run begins from the result, at the loss that the table shows; `steps` chooses checkpoints."""
    capsys.readouterr()
    assert cli.main(["merge", str(finished), f"out={tmp_path / 'ema'}", "by=ema", "decay=0.3", "device=cpu"]) == 0
    shown = json.loads(capsys.readouterr().out)
    losses = [model["loss"] for model in shown["models"]]
    assert len(losses) == 3 and losses[0] > losses[2] > losses[1]
    assert losses[1] == pytest.approx(read_metrics(finished / "metrics.jsonl")[-1]["heldout_loss"], rel=1e-6)
    steps = [load(finished, step).weights["embed.weight"].double() for step in (2, 4)]
    found = load(tmp_path / "ema")
    assert torch.allclose(found.weights["embed.weight"].double(), 0.3 * steps[0] + 0.7 * steps[1], atol=1e-7)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 3 \(there are: 2, 4\)"):
        merge_of([finished], tmp_path / "other", steps=[2, 3])
    with pytest.raises(ConfigError, match="1 model is too few"):
        merge_of([finished], tmp_path / "other", steps=[2])


def test_all_losses_are_of_the_same_windows(make_model, tmp_path, capsys):
    """One model twice, which was trained on windows of another length the second time."""
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 8)
    models = [make_model("short", 1, loop={"seq_len": 8}), make_model("long", 1, loop={"seq_len": 16})]
    capsys.readouterr()
    merge_of(models, tmp_path / "out", compare=True, data=str(tmp_path / "text.txt"), device="cpu")
    first, second, merged = (model["loss"] for model in json.loads(capsys.readouterr().out)["models"])
    assert first == second == pytest.approx(merged, rel=1e-6)


def test_a_new_run_starts_from_a_merged_checkpoint(finished, train_job, tmp_path):
    merge_of([finished], tmp_path / "out")
    assert train_job(tmp_path / "runs", checkpoint__init_from=str(tmp_path / "out"), train__steps=1) == 0
    fresh = read_metrics(finished / "metrics.jsonl")[0]["loss"]
    assert read_metrics(tmp_path / "runs" / "first" / "metrics.jsonl")[0]["loss"] < fresh - 0.01
    with pytest.raises(CheckpointError, match=r"checkpoint\.init_from"):
        train_job(tmp_path / "more", checkpoint__resume=str(tmp_path / "out"), train__steps=2)


def test_ties_of_a_model_and_its_base_is_the_model(make_model, tmp_path):
    a, base = make_model("a", 1), make_model("base", 2)
    for within in ("model", "tensor"):
        found = merge_of([a, a], tmp_path / within, by="ties", base=str(base), density=1.0, within=within)
        for name, tensor in load(a).weights.items():
            assert torch.allclose(found.weights[name], tensor, atol=1e-6), name
    assert found.manifest.identity.made_from["sources"][-1]["role"] == "base"


def test_models_that_differ_are_refused_by_name(make_model, tmp_path):
    a = make_model("a", 1)
    wider = make_model("wider", 1, ffn_size=48)
    gelu = make_model("gelu", 1, norm="layernorm", activation="gelu", position="learned")
    with pytest.raises(ConfigError, match=r"a and .*wider are models of different shapes.*ffn_size is 128 and 48"):
        merge_of([a, wider], tmp_path / "out")
    with pytest.raises(ConfigError, match=r"different shapes or families .*model.norm is rmsnorm and layernorm"):
        merge_of([a, gelu], tmp_path / "out")
    with pytest.raises(ConfigError, match="base"):
        merge_of([a, a], tmp_path / "out", by="ties")
    with pytest.raises(ConfigError, match=r"decay: by=average does not read it; it is for by=ema"):
        merge_of([a, a], tmp_path / "out", decay=0.5)
    with pytest.raises(ConfigError, match="by=slerp lies between two models, given 3"):
        merge_of([a, a, a], tmp_path / "out", by="slerp")
    with pytest.raises(ConfigError, match="1 weights for 2 models"):
        merge_of([a, a], tmp_path / "out", weights=[1.0])
    assert not (tmp_path / "out").exists()


def test_models_of_other_tokenizers_are_refused(make_model, tokenizer, tmp_path):
    from megatrain.config import TokenizerConfig
    from megatrain.data.train_sentencepiece import train_sentencepiece

    a, b = make_model("a", 1), make_model("b", 2, with_tokenizer=False)
    words = ["other words", "of another tokenizer", "entirely"] * 40
    train_sentencepiece(iter(words), TokenizerConfig(vocab_size=300)).save(b / "tokenizer")
    with pytest.raises(ConfigError, match="different tokenizers"):
        merge_of([a, b], tmp_path / "out")


def test_values_that_are_not_finite_damage_and_a_full_disk_leave_nothing_behind(make_model, tmp_path, monkeypatch):
    a, spoilt = make_model("a", 1), make_model("spoilt", 2, spoil="model.blocks.1.mlp.up.weight")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.up\.weight has 1 of 4096 values that are NaN"):
        merge_of([a, spoilt], tmp_path / "out")
    broken = shutil.copytree(a, tmp_path / "broken")
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="checksum differs"):
        merge_of([a, broken], tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    with pytest.raises(EnvironmentFault, match=re.escape("has only 1 free")):
        merge_of([a, a], tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_nothing_is_overwritten(make_model, tmp_path, capsys):
    a = make_model("a", 1)
    assert cli.main(["merge", str(a), str(a), f"out={a}"]) == 2
    assert "exists already" in capsys.readouterr().err

"""`megatrain compress`: the smaller model is evaluated and sampled from, and what cannot be made is refused by name."""

import json
from dataclasses import asdict

import pytest
import torch
from gguf import GGUFReader
from support.records import at
from transformers import AutoModelForCausalLM, TorchAoConfig

from megatrain import cli
from megatrain.checkpoint import lineage
from megatrain.checkpoint.manifest import Identity
from megatrain.checkpoint.store import write
from megatrain.config import CompressConfig, ExportConfig, GenerateConfig, InspectConfig, MergeConfig, ModelConfig
from megatrain.errors import CheckpointError, ConfigError
from megatrain.interop.gguf_file import read_gguf
from megatrain.interop.load_model import load
from megatrain.model.init import build_model
from megatrain.tracking.metrics import read_metrics
from megatrain.verbs.compress import compress
from megatrain.verbs.export import export_
from megatrain.verbs.generate import generate
from megatrain.verbs.inspect import inspect
from megatrain.verbs.merge import merge


def compressed(path, out, to, **keys):
    compress(CompressConfig(path=str(path), out=str(out), to=to, **{"compare": False, **keys}))
    return out


def test_int8_weights_give_the_logits_of_transformers_with_torchao(family, tmp_path):
    """Embeddings and head stay as they are in both."""
    folder, config, _ = family("llama")
    out = compressed(folder, tmp_path / "small", "int8")
    export_(ExportConfig(path=str(folder), out=str(tmp_path / "hf")))
    from torchao.quantization import Int8WeightOnlyConfig

    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", quantization_config=TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    )
    ids = torch.randint(0, config.vocab, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, dense = (load(path).build(torch.device("cpu"))(ids) for path in (out, folder))
        theirs = oracle(ids).logits
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert float((ours - dense).abs().max()) > 1e-3, "which are not those of the dense model"


@pytest.mark.parametrize(("name", "to"), [("llama", "int4"), ("gpt2", "int8"), ("gpt2", "int4")])
def test_quantised_weights_compute_what_their_dense_values_do(name, to, family, tmp_path, capsys):
    folder, _, _ = family(name)
    out = (
        compressed(folder, tmp_path / "small", to, group_size=16)
        if to == "int4"
        else compressed(folder, tmp_path / "small", to)
    )
    loaded = load(out)
    assert loaded.quantized and not any(key in loaded.weights for key in loaded.quantized)
    dense = load(folder).build(torch.device("cpu"))
    with torch.no_grad():
        for key, weight in loaded.quantized.items():
            dense.get_parameter(key).copy_(weight.dense())
        ids = torch.arange(20).unsqueeze(0)
        assert torch.allclose(loaded.build(torch.device("cpu"))(ids), dense(ids), atol=2e-4)
    capsys.readouterr()
    generate(GenerateConfig(path=str(out), prompt="the model", max_new_tokens=5, temperature=0.0, device="cpu"))
    assert capsys.readouterr().out.startswith("the model")
    assert cli.main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"megatrain compress to={to}" in shown and f"{sum(p.numel() for p in dense.parameters()):,}" in shown


def test_size_speed_and_loss_are_shown_before_and_after(finished, tmp_path, capsys):
    capsys.readouterr()
    words = [f"out={tmp_path / 'small'}", "to=int8", "dtype=bf16", "device=cpu"]
    assert cli.main(["compress", str(finished), *words]) == 0
    captured = capsys.readouterr()
    before, after = json.loads(captured.out)["models"]
    assert before["loss"] == pytest.approx(read_metrics(finished / "metrics.jsonl")[-1]["heldout_loss"], rel=1e-6)
    assert after["loss"] == pytest.approx(before["loss"], abs=0.02) and after["loss"] != before["loss"]
    assert (
        after["bytes"] < before["bytes"] / 2 and after["bytes"] < (tmp_path / "small" / "0.safetensors").stat().st_size
    )
    assert all(model[speed] > 0 for model in (before, after) for speed in ("read_per_s", "written_per_s"))
    assert "tokens/s written" in captured.err


@pytest.mark.parametrize(("to", "keys"), [("pruned", {"share": 0.3}), ("pruned", {"within": "tensor"}), ("2:4", {})])
def test_a_pruned_model_trains_on_and_exports(to, keys, finished, train_job, tmp_path):
    out = compressed(finished, tmp_path / "sparse", to, **keys)
    before, after = load(finished).weights, load(out).weights
    layers = [name for name in before if name.startswith("blocks.") and before[name].dim() == 2]
    for name, tensor in after.items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], before[name][kept]), "what stays is unchanged"
        assert name in layers or torch.equal(tensor, before[name])
    zeros = sum(int((after[name] == 0).sum()) for name in layers)
    assert zeros == round(keys.get("share", 0.5) * sum(after[name].numel() for name in layers))
    if to == "2:4":
        export_(ExportConfig(path=str(out), out=str(tmp_path / "hf")))
        assert train_job(tmp_path / "runs", checkpoint__init_from=str(out), train__steps=1) == 0


def test_quantised_weights_are_refused_where_dense_ones_are_needed(family, finished, train_job, tmp_path):
    small = compressed(finished, tmp_path / "small", "int8")
    for use in (
        lambda out: export_(ExportConfig(path=str(small), out=out)),
        lambda out: compress(CompressConfig(path=str(small), out=out, to="int4")),
        lambda out: merge(MergeConfig(paths=[str(small), str(small)], out=out)),
        lambda out: train_job(tmp_path / "runs", checkpoint__init_from=str(small)),
    ):
        with pytest.raises(
            CheckpointError, match=r"small holds quantised weights \(int8\).*made from: .*step_00000004"
        ):
            use(str(tmp_path / "other"))
        assert not (tmp_path / "other").exists()


def test_what_cannot_be_made_is_refused(finished, tmp_path):
    for to, keys, says in (
        ("int4", {"group_size": 7}, r"group_size=7: .* of 32, 48 values; give group_size=8"),
        ("int8", {"share": 0.3}, r"share: to=int8 does not read it; it is for to=pruned"),
    ):
        with pytest.raises(ConfigError, match=says):
            compressed(finished, tmp_path / "out", to, **keys)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="exists already"):
        compressed(finished, finished, "int8")


@pytest.mark.parametrize(
    "shape", [{}, {"attention_bias": "qkv"}, {"qk_norm": True, "tie_embeddings": True, "head_size": 128}]
)
def test_transformers_reads_the_same_logits_from_a_gguf_file(shape, tokenizer, tmp_path):
    """Llama, Qwen2 and Qwen3 (of which it reads heads of 128 alone), with grouped heads; q8_0 comes close."""
    config = ModelConfig(
        **{"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 64, "ffn_size": 96, "init_std": 0.2},
        **{"vocab_size": tokenizer.vocab_size, "max_seq_len": 64, **shape},
    )
    model = build_model(config, seed=3)
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(folder / "tokenizer")
    state = {f"model.{key}": value.detach() for key, value in model.named_parameters()}
    write(folder, state, at(0, identity=Identity({"model": asdict(config)})), None)
    compressed(folder, tmp_path / "gguf" / "model.gguf", "gguf", gguf_type="f32")
    ids = torch.randint(0, config.vocab, (2, 20), generator=torch.Generator().manual_seed(4))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(ids).logits, model.eval()(ids), atol=1e-4)
    small = compressed(folder, tmp_path / "small.gguf", "gguf")
    for name, tensor in read_gguf(small, config).items():
        assert torch.allclose(tensor, model.get_parameter(name), atol=float(tensor.abs().max()) / 127), name


def test_a_gguf_file_says_where_its_model_came_from(finished, tmp_path, capsys):
    pruned = compressed(finished, tmp_path / "pruned", "pruned")
    file = compressed(pruned, tmp_path / "model.gguf", "gguf", gguf_type="f32")
    line = lineage.find_line(pruned)
    fields = GGUFReader(file).fields
    assert fields["general.base_model.count"].contents() == 1
    assert fields["general.base_model.0.name"].contents() == line[-1].name
    capsys.readouterr()
    inspect(InspectConfig(path=str(file)))
    shown = " ".join(capsys.readouterr().out.split())
    assert len(line) == 2
    for row in lineage.rows(line):
        assert " ".join(filter(None, row)) in shown, "the run, and the pruned model"
    assert "number formats: F32" in shown
    for size in (0, 100, file.stat().st_size // 2):
        (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: not a GGUF file, or cut short"):
            inspect(InspectConfig(path=str(tmp_path / "cut.gguf")))


def test_a_family_that_llama_cpp_does_not_lay_out_alike_is_refused(family, finished, tmp_path):
    with pytest.raises(ConfigError, match=r"to=gguf: models of the family gpt2 cannot be written"):
        compressed(family("gpt2")[0], tmp_path / "x.gguf", "gguf")
    with pytest.raises(ConfigError, match=r"rows must be multiples of 32 values.*some of 48; use gguf_type=f16"):
        compressed(finished, tmp_path / "x.gguf", "gguf", gguf_type="q4_0")
    assert not list(tmp_path.glob("*x.gguf*"))

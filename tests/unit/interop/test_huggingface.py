"""Hugging Face folders: transformers computes the same from what we write, and we from what it writes."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatrain.config import ModelConfig
from megatrain.errors import CheckpointError, ConfigError
from megatrain.interop.huggingface import export_model, hf_config, import_model
from megatrain.model.gpt import GPT
from megatrain.model.init import build_model
from megatrain.model.sampling import generate

torch.set_num_threads(1)

GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True}
SHAPES = {
    "gpt2": {**GPT2, "num_heads": 4, "hidden_size": 32, "vocab_size": 61, "tie_embeddings": True},
    "gpt2 odd": {**GPT2, "num_heads": 3, "hidden_size": 21, "ffn_size": 50, "vocab_size": 101, "tie_embeddings": True},
    "gpt2 untied": {**GPT2, "num_layers": 3, "num_heads": 2, "hidden_size": 24, "vocab_size": 67, "norm_eps": 1e-3},
    "llama": {"num_heads": 4, "hidden_size": 32, "vocab_size": 61},
    "llama gqa": {"num_heads": 6, "num_kv_heads": 2, "hidden_size": 48, "ffn_size": 70, "vocab_size": 127},
    "llama tied": {"num_heads": 4, "num_kv_heads": 1, "hidden_size": 32, "vocab_size": 99, "tie_embeddings": True},
    "llama wide heads": {"num_heads": 2, "hidden_size": 32, "head_size": 24, "vocab_size": 61, "rope_theta": 500.0},
    "llama biased": {"num_heads": 4, "hidden_size": 32, "vocab_size": 61, "bias": True, "norm_eps": 1e-3},
    "qk norm": {
        "num_heads": 6,
        "num_kv_heads": 3,
        "hidden_size": 32,
        "head_size": 8,
        "vocab_size": 61,
        "qk_norm": True,
    },
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def make_config(shape: str, **changes) -> ModelConfig:
    return ModelConfig(**{"max_seq_len": 64, "init_std": 0.2, "num_layers": 2, **SHAPES[shape], **changes})


def make_model(config: ModelConfig) -> GPT:
    """A model whose every parameter is random: norms and biases too, or a swapped pair of them would go unseen."""
    model = build_model(config, seed=7).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(float(name.endswith("norm.weight")), 0.3, generator=generator)
    return model


def weights_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(params=SHAPES)
def exported(request, tmp_path) -> tuple[GPT, Path]:
    model = make_model(make_config(request.param))
    export_model(model.config, weights_of(model), tmp_path / "hf", end_of_document=1)
    return model, tmp_path / "hf"


def test_transformers_computes_the_same_logits_and_greedy_tokens(exported):
    """Within 1e-5 of logits of order one; greedy tokens through both caches, past the end of neither."""
    model, folder = exported
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    theirs.eval()
    assert not any(report.values()), report
    assert type(theirs).__name__ == CLASSES[theirs.config.model_type]
    assert theirs.config.architectures == [CLASSES[theirs.config.model_type]]
    tokens = torch.randint(0, model.config.vocab, (3, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, expected = model(tokens), theirs(tokens).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for prompt in ([3, 5, 8], [2]):
        their_tokens = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
        our_tokens = list(generate(model, prompt, max_new_tokens=20, temperature=0, stop_id=1))
        assert their_tokens in (prompt + our_tokens, [*prompt, *our_tokens, 1])


def test_a_round_trip_keeps_config_and_every_bit(exported):
    model, folder = exported
    config, weights = import_model(folder)
    assert config == ModelConfig(
        **{**vars(model.config), "ffn_size": model.config.ffn_dim, "num_kv_heads": config.num_kv_heads}
    )
    assert config.kv_heads == model.config.kv_heads
    original = weights_of(model)
    assert list(weights) == list(original)
    for name, weight in weights.items():
        assert torch.equal(weight, original[name]) and weight.is_contiguous(), name


def test_a_folder_that_transformers_wrote_is_imported(exported, tmp_path):
    """transformers' own random model, saved by itself, gives the same logits here."""
    folder = exported[1]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    config, weights = import_model(tmp_path / "theirs")
    ours = build_model(config).eval()
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"head.weight"}
    tokens = torch.randint(0, config.vocab, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_transformers_samples_from_the_folder_and_stops_at_the_end_of_document(tmp_path):
    model = make_model(make_config("llama"))
    first = next(generate(model, [3], max_new_tokens=1, temperature=0))
    export_model(model.config, weights_of(model), tmp_path / "hf", end_of_document=first)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.generate(torch.tensor([[3]]), max_new_tokens=9, do_sample=False).tolist() == [[3, first]]
    assert theirs.generate(torch.tensor([[4]]), max_new_tokens=9, do_sample=True).shape[1] <= 10


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_16_bit_folder_holds_the_rounded_weights(tmp_path, name, dtype):
    model = make_model(make_config("llama"))
    export_model(model.config, weights_of(model), tmp_path / "hf", dtype=name)
    _, weights = import_model(tmp_path / "hf")
    assert all(torch.equal(weights[n], w.to(dtype)) for n, w in weights_of(model).items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype


def test_a_large_model_is_written_and_read_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("megatrain.interop.huggingface.MAX_SHARD_SIZE", "10KB")
    model = make_model(make_config("gpt2"))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    _, weights = import_model(tmp_path / "hf")
    assert all(torch.equal(weights[n], w) for n, w in weights_of(model).items())
    next((tmp_path / "hf").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.*missing"):
        import_model(tmp_path / "hf")


@pytest.mark.parametrize(
    ("shape", "changes", "key"),
    [
        ("gpt2", {"bias": False}, "model.bias=False"),
        ("gpt2", {"num_kv_heads": 2}, "model.num_kv_heads=2"),
        ("gpt2", {"head_size": 5}, "model.head_size=5"),
        ("gpt2", {"norm": "rmsnorm"}, "model.norm=rmsnorm"),
        ("gpt2", {"qk_norm": True}, "model.qk_norm=True"),
        ("llama", {"norm": "layernorm"}, "model.norm=layernorm"),
        ("llama", {"activation": "gelu"}, "model.activation=gelu"),
        ("llama", {"hidden_size": 34, "head_size": 8}, "model.head_size=8"),
        ("qk norm", {"bias": True}, "model.bias=true with model.qk_norm=true"),
    ],
)
def test_what_no_hugging_face_class_computes_is_refused_by_its_key(shape, changes, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        hf_config(make_config(shape, **changes), None)


@pytest.mark.parametrize(
    ("shape", "changes", "field"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"some_new_switch": 1}, "some_new_switch"),
        ("llama", {"model_type": "mixtral"}, "model_type"),
        ("llama", {"hidden_size": "wide"}, "hidden_size"),
        ("gpt2", {"activation_function": "relu"}, "activation_function"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"attn_pdrop": 0.3}, "attn_pdrop"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("qk norm", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding_window"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(tmp_path, shape, changes, field):
    model = make_model(make_config(shape))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=field):
        import_model(tmp_path / "hf")


def test_older_names_of_the_same_thing_are_understood(tmp_path):
    """`rope_theta` beside the shape, as transformers 4 wrote it; GPT-2 without its prefix, with stored mask
    constants."""
    llama = make_model(make_config("llama wide heads"))
    export_model(llama.config, weights_of(llama), tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    fields = json.loads(path.read_text())
    del fields["rope_parameters"]
    path.write_text(json.dumps({**fields, "rope_theta": 500.0, "rope_scaling": None, "pretraining_tp": 1}))
    assert import_model(tmp_path / "llama")[0].rope_theta == 500.0

    gpt2 = make_model(make_config("gpt2"))
    export_model(gpt2.config, weights_of(gpt2), tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "model.safetensors"
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(old, file)
    path = tmp_path / "gpt2" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "n_ctx": 64, "n_inner": None, "activation_function": "gelu_pytorch_tanh"}))
    config, weights = import_model(tmp_path / "gpt2")
    assert config.ffn_size == 128
    assert all(torch.equal(weights[name], weight) for name, weight in weights_of(gpt2).items())


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


DAMAGE = {
    "a tensor missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    "a tensor too many": (lambda t: t.update({"score.weight": torch.ones(2)}), "score.weight has no place"),
    "a wrong shape": (lambda t: t.update({"model.norm.weight": torch.ones(9)}), r"model.norm.weight has shape \(9,\)"),
    "an untied head": (lambda t: t.update({"lm_head.weight": torch.ones(99, 32)}), "tie_word_embeddings is true"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_weights_that_do_not_fit_their_config_are_refused_by_name(tmp_path, kind):
    model = make_model(make_config("llama tied"))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    change, message = DAMAGE[kind]
    change_tensors(tmp_path / "hf", change)
    with pytest.raises(CheckpointError, match=message):
        import_model(tmp_path / "hf")


def test_a_tied_head_that_was_stored_twice_is_taken_once(tmp_path):
    model = make_model(make_config("llama tied"))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    change_tensors(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "head.weight" not in import_model(tmp_path / "hf")[1]


def test_pickles_and_damaged_files_are_refused_and_never_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was loaded"))
    model = make_model(make_config("llama"))
    export_model(model.config, weights_of(model), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        import_model(tmp_path / "hf")
    file.unlink()
    torch.save({"a": 1}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        import_model(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        import_model(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        import_model(tmp_path / "hf")
    with pytest.raises(ConfigError, match="no such folder"):
        import_model(tmp_path / "nowhere")


def test_an_export_that_fails_leaves_nothing_and_one_that_exists_is_kept(tmp_path):
    model = make_model(make_config("llama"))
    weights = weights_of(model)
    with pytest.raises(ConfigError, match="not a saved tokenizer"):
        export_model(model.config, weights, tmp_path / "hf", tokenizer_dir=tmp_path / "none")
    assert not list(tmp_path.iterdir())
    weights.pop("final_norm.weight")
    with pytest.raises(CheckpointError, match=r"final_norm\.weight is missing"):
        export_model(model.config, weights, tmp_path / "hf")
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_model(model.config, weights_of(model), tmp_path / "hf")
    with pytest.raises(ConfigError, match="dtype=int8"):
        export_model(model.config, weights_of(model), tmp_path / "other", dtype="int8")

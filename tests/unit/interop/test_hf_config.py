"""config.json files that contradict themselves or hold values out of range: transformers' reading of them, or none."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatrain.errors import CheckpointError, ConfigError
from megatrain.interop.huggingface import export_model, import_model
from megatrain.model.init import build_model

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 700.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def folder_with(folder, changes, kind="llama"):
    """Write transformers' own model of random weights, then these fields into its config.json; None removes one."""
    torch.manual_seed(0)
    sizes = {} if kind == "gpt2" else SIZES
    small = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 61, "initializer_range": 0.2}
    config = transformers.AutoConfig.for_model(kind, **(sizes or small))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": LINEAR, "rope_parameters": PLAIN},
        {"rope_scaling": LINEAR, "rope_parameters": PLAIN, "rope_theta": 300.0},
        {"rope_scaling": PLAIN, "rope_parameters": {**LINEAR, "rope_theta": 300.0}},
        {"rope_scaling": {**LINEAR, "rope_theta": 90.0}, "rope_parameters": None, "rope_theta": 300.0},
        {"rope_scaling": {"type": "default", **LINEAR}, "rope_parameters": YARN},
        {"rope_scaling": {}, "rope_parameters": LINEAR, "rope_theta": 300.0},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 300.0}, "rope_theta": 90.0},
        {"rope_scaling": YARN, "rope_parameters": PLAIN, "original_max_position_embeddings": 32},
        {"rope_scaling": LLAMA3, "rope_parameters": LINEAR, "original_max_position_embeddings": 8},
    ],
)
def test_contradictory_fields_of_rope_mean_what_they_mean_to_transformers(tmp_path, kind, changes):
    if kind == "phi3" and (changes.get("rope_scaling") or changes["rope_parameters"]).get("rope_type") != "default":
        changes = {"rope_scaling": PLAIN, "rope_parameters": {"rope_theta": 90.0}, "rope_theta": 300.0}
    folder = folder_with(tmp_path / "theirs", changes, kind)
    config, weights = import_model(folder)
    ours = build_model(config).eval()
    ours.load_state_dict(weights, strict=False)
    tokens = torch.randint(0, 61, (2, 60), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-5, atol=2e-5)


def scaling(**changes):
    return {"rope_scaling": {**LLAMA3, **changes}}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", scaling(low_freq_factor=4.0), "rope_scaling.high_freq_factor=4 must be above rope_scaling.low_freq_"),
        ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 9}}, "rope_parameters.high_freq_factor=4 must be"),
        ("llama", scaling(factor=0.5), "rope_scaling.factor=0.5 is out of range: must be at least 1"),
        ("llama", scaling(factor=float("nan")), "rope_scaling.factor=nan is out of range: must be at least 1 and fin"),
        ("llama", scaling(original_max_position_embeddings=16.5), "original_max_position_embeddings=16.5 .* an integ"),
        ("qwen2", scaling(low_freq_factor=0), "rope_scaling.low_freq_factor=0.0 is out of range"),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 2.0}}, "rope_scaling.beta_fast=1 must not"),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta=0.0 is out of range: must be above 0"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear' is not an object"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0 is out of range: must be above 0"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is out of range: must be above 0 and finite"),
        ("gpt2", {"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon=inf is out of range"),
        ("gpt2", {"n_layer": 10**9}, "n_layer=1000000000 is out of range: must be at least 1 and at most 100000"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is out of range"),
        ("qwen2", {"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers=1000000000 is out of range"),
        ("gpt2", {"num_hidden_layers": 10**9}, "n_layer=1000000000 is out of range"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads=0 is out of range: must be at least 1"),
        (
            "llama",
            {"num_key_value_heads": 3},
            "num_attention_heads=4 is not divisible by num_key_value_heads=3",
        ),
        ("llama", {"head_dim": 3}, "the head size must be even; it is 3; give head_dim=4"),
        ("gpt2", {"resid_pdrop": 1.0}, "resid_pdrop=1.0 is out of range: must be at least 0 and below 1"),
        ("llama", {"initializer_range": 0.0}, "initializer_range=0.0 is out of range: must be above 0"),
        ("llama", {"max_position_embeddings": 0}, "max_position_embeddings=0 is out of range: must be at least 1"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 is out of range: must be at least 1"),
    ],
)
def test_values_that_train_refuses_are_refused_on_import_by_their_names_in_the_file(tmp_path, kind, changes, message):
    folder = folder_with(tmp_path / "theirs", changes, kind)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        import_model(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fp64_weights_that_fp32_cannot_hold_are_refused_by_tensor(tmp_path, kind):
    folder = folder_with(tmp_path / "theirs", {}, kind)
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    import_model(folder)
    name = max(weights)
    weights[name].view(-1)[3] = -1e300
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"tensor {name} has 1 of \d+ values beyond fp32's range, such as -1e\+300"
    ):
        import_model(folder)


def test_weights_that_the_exported_dtype_cannot_hold_are_refused_by_tensor(tmp_path):
    config, weights = import_model(folder_with(tmp_path / "theirs", {}))
    weights["final_norm.weight"][1] = 7e4
    export_model(config, weights, tmp_path / "bf16", dtype="bf16")
    with pytest.raises(ConfigError, match=r"dtype=fp16: tensor model.norm.weight has .* fp16's range, .*; use .*bf16"):
        export_model(config, weights, tmp_path / "fp16", dtype="fp16")
    assert not (tmp_path / "fp16").exists()

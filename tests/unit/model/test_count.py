"""Counts by arithmetic equal what PyTorch counts on the model itself, and what was published."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatrain.config import ModelConfig
from megatrain.model.count import flops_per_token, num_parameters, parameter_shapes, preset_table, presets
from megatrain.model.gpt import GPT

torch.set_num_threads(1)

PUBLISHED = {
    "gpt2_124m": 124_439_808,  # the four GPT-2 checkpoints of the Hugging Face hub
    "gpt2_350m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
    "llama_1b": 1_235_814_400,  # Llama 3.2 1B and 3B, Llama 3 8B and 70B
    "llama_3b": 3_212_749_824,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
}
GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True, "tie_embeddings": True}


@pytest.mark.parametrize("name", presets())
def test_parameters_are_those_of_the_model(name):
    """Names, order and shapes, without memory, up to the trillion."""
    with torch.device("meta"):
        model = GPT(presets()[name])
    built = [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert built == list(parameter_shapes(presets()[name]).items())
    assert num_parameters(presets()[name]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert num_parameters(presets()[name]) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "billions"), [("gpt_175b", 174.6), ("gpt_1t", 1008.0)])
def test_the_largest_presets_follow_the_published_formula(name, billions):
    """Narayanan et al. (SC21), equation 2; it leaves out the final LayerNorm, 2h."""
    config = presets()[name]
    layers, h, vocab, s = config.num_layers, config.hidden_size, config.vocab, config.max_seq_len
    assert num_parameters(config) == 12 * layers * h * h + 13 * layers * h + (vocab + s) * h + 2 * h
    assert round(num_parameters(config) / 1e9, 1) == billions


@pytest.mark.parametrize(
    "changes",
    [
        GPT2,
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_size": 6, "qk_norm": True, "tie_embeddings": True},
        {"norm": "layernorm", "bias": False, "position": "learned"},
        {"attention_bias": "qkv", "activation": "geglu"},
        {"bias": True, "attention_bias": "none"},
        {"attention_bias": "all", "qk_norm": True, "qk_norm_over": "heads", "num_kv_heads": 2, "norm_place": "after"},
    ],
)
def test_parameters_of_mixed_families_are_those_of_the_model(changes):
    config = ModelConfig(num_layers=2, num_heads=4, hidden_size=32, vocab_size=61, **changes)
    with torch.device("meta"):
        built = {n: tuple(p.shape) for n, p in GPT(config).named_parameters()}
    assert built == parameter_shapes(config)


@pytest.mark.parametrize(
    "changes", [GPT2, {"num_kv_heads": 2}, {"num_kv_heads": 1, "head_size": 6, "activation": "geglu"}]
)
def test_flops_are_those_pytorch_counts_forward_and_backward(changes):
    config = ModelConfig(num_layers=2, num_heads=4, hidden_size=32, vocab_size=61, **changes)
    with torch.device("meta"):
        model = GPT(config)
        tokens = torch.zeros(3, 20, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    assert counter.get_total_flops() == flops_per_token(config, 20) * 3 * 20


def test_causal_flops_count_the_lower_triangle_of_attention():
    config = presets()["tiny"]
    without = flops_per_token(config, 0)
    full, causal = (flops_per_token(config, 64, causal=c) - without for c in (False, True))
    assert causal * 64 * 64 == full * (64 * 65 // 2)


def test_counting_imports_no_torch():
    code = "import sys, megatrain.model.count as c; c.preset_table(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_documented_table_is_the_computed_one():
    assert preset_table() in (Path(__file__).parents[3] / "docs" / "reference" / "models.md").read_text(
        encoding="utf-8"
    )


def test_only_the_cpu_sized_presets_leave_the_vocabulary_to_the_tokenizer():
    text = {
        p.stem: p.read_text(encoding="utf-8") for p in (Path(__file__).parents[3] / "conf" / "model").glob("*.yaml")
    }
    assert text.keys() == presets().keys()
    assert {name for name, content in text.items() if "vocab_size" not in content} == {"tiny", "small"}

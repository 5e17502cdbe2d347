"""Low-rank layers against peft's, on the same weights and tokens: losses, gradients, merged weights, exported files."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig as TheirConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from megatrain.config import LoraConfig, MethodConfig, ModelConfig
from megatrain.errors import ConfigError
from megatrain.interop.adapter import export_adapter
from megatrain.interop.huggingface import export_model
from megatrain.kernels import IGNORE_INDEX
from megatrain.model.count import trained_shapes
from megatrain.model.gpt import GPT
from megatrain.model.init import build_model
from megatrain.model.lora import add_adapters, merged

CONFIG = ModelConfig(
    name="t", num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32, ffn_size=48, vocab_size=64, max_seq_len=32
)
LORA = LoraConfig(rank=3, alpha=6.0, targets=["q", "v", "o", "up", "down"])
THEIRS = {"q": "q_proj", "v": "v_proj", "o": "o_proj", "up": "up_proj", "down": "down_proj"}
ATTENTION = ("q", "k", "v", "o")


def adapted():
    """Return a model with low-rank layers, none of them zero, and the weights without them."""
    model = build_model(CONFIG, seed=3)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    add_adapters(model, LORA)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".lora_a", ".lora_b")):
                parameter.normal_(std=0.1)
    return model, base


def adapters_of(model: GPT):
    return {name: p for name, p in model.named_parameters() if name.endswith((".lora_a", ".lora_b"))}


def their_name(name):
    """Return the name that peft gives to one of our low-rank layers."""
    _, block, group, target, what = name.split(".")
    part = "self_attn" if group == "attn" else "mlp"
    return f"base_model.model.model.layers.{block}.{part}.{THEIRS[target]}.lora_{what[-1].upper()}.default.weight"


@pytest.fixture
def batch():
    torch.manual_seed(7)
    tokens = torch.randint(0, 64, (3, 20))
    labels = torch.randint(0, 64, (3, 20))
    labels[0, :9] = IGNORE_INDEX
    return tokens, labels


def test_loss_and_gradients_are_those_of_peft(batch, tmp_path):
    tokens, labels = batch
    model, base = adapted()
    export_model(CONFIG, base, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = get_peft_model(
        theirs, TheirConfig(r=3, lora_alpha=6, target_modules=list(THEIRS.values()), task_type="CAUSAL_LM")
    )
    parameters = dict(theirs.named_parameters())
    for name, ours in adapters_of(model).items():
        parameters[their_name(name)].data.copy_(ours.data)
    assert sum(p.requires_grad for p in parameters.values()) == len(adapters_of(model))

    loss = model(tokens, labels)
    loss.backward()
    logits = theirs(tokens).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for name, ours in model.named_parameters():
        if name in adapters_of(model):
            torch.testing.assert_close(ours.grad, parameters[their_name(name)].grad, rtol=1e-5, atol=1e-5)
        else:
            assert ours.grad is None, f"{name} is frozen"


def test_merged_weights_compute_what_the_layers_beside_them_do(batch):
    tokens, _ = batch
    model, base = adapted()
    weights = merged({name: p.detach() for name, p in model.named_parameters()}, LORA)
    assert weights.keys() == base.keys()
    plain = build_model(CONFIG)
    plain.load_state_dict({**weights, **({"head.weight": weights["embed.weight"]} if CONFIG.tie_embeddings else {})})
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert (plain(tokens) - build_model(CONFIG, seed=3)(tokens)).abs().max() > 1e-2


def test_peft_loads_the_exported_adapter_on_the_exported_base(batch, tmp_path):
    tokens, _ = batch
    model, base = adapted()
    export_model(CONFIG, base, tmp_path / "base")
    export_adapter(CONFIG, {name: p.detach() for name, p in adapters_of(model).items()}, LORA, tmp_path / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-5, atol=1e-5)


def test_a_family_with_fused_projections_has_no_adapter_of_its_own(tmp_path):
    with pytest.raises(ConfigError, match=r"adapter=true: phi3 stores .*leave adapter out"):
        export_adapter(CONFIG, {}, LORA, tmp_path / "adapter", family="phi3")


def test_a_value_head_is_trained_beside_them():
    model = GPT(CONFIG, has_values=True)
    add_adapters(model, LORA)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {*adapters_of(model), "value.weight"}


def test_a_score_is_trained_beside_them_and_not_lost_in_an_adapter(tmp_path):
    config = replace(CONFIG, output="score", tie_embeddings=False)
    model = GPT(config)
    add_adapters(model, LORA)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {*adapters_of(model), "score.weight"}
    assert trained == trained_shapes(config, MethodConfig(name="reward", lora=LORA)).keys()
    with pytest.raises(ConfigError, match="adapter=true: a reward model has learnt its score"):
        export_adapter(config, {}, LORA, tmp_path / "adapter")

"""Activation recompute: other memory and more work, the same parameters and the same bits."""

import pytest
import torch

from megatrain.config import ModelConfig
from megatrain.model.gpt import GPT
from megatrain.model.init import build_model
from megatrain.parallel.recompute import recompute_blocks

torch.set_num_threads(1)

GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True, "tie_embeddings": True}
LLAMA = {"num_kv_heads": 2}
FAMILIES = pytest.mark.parametrize("family", [GPT2, LLAMA], ids=["gpt2", "llama"])
POLICIES = pytest.mark.parametrize("policy", ["selective", "full"])


def make_model(family: dict, **changes) -> GPT:
    shape = {"num_layers": 3, "num_heads": 4, "hidden_size": 32, "ffn_size": 48, "vocab_size": 61, "max_seq_len": 32}
    return build_model(ModelConfig(**{**shape, "init_std": 0.3, **family, **changes}), seed=1)


def loss_and_gradients(model: GPT, **arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    ids = torch.randint(0, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:], **arguments)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@FAMILIES
@POLICIES
def test_recompute_repeats_the_blocks_and_changes_no_bit_of_the_gradients(family, policy):
    model = make_model(family, dropout=0.2)
    plain_loss, plain = loss_and_gradients(model, dropout_seed=3)
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    recompute_blocks(model.blocks, policy)
    loss, gradients = loss_and_gradients(model, dropout_seed=3)
    assert len(calls) == 2 * model.config.num_layers
    assert torch.equal(plain_loss, loss)
    assert plain.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(plain[name], gradient), name


@POLICIES
def test_without_gradients_nothing_is_kept_or_repeated(policy):
    model = make_model(LLAMA)
    recompute_blocks(model.blocks, policy)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("saved"), lambda x: x):
        model(torch.zeros(1, 4, dtype=torch.long))


@FAMILIES
@POLICIES
def test_recompute_works_with_compiled_blocks(family, policy):
    torch.compiler.reset()  # other tests may have compiled blocks as often as torch allows
    model = make_model(family)
    plain_loss, plain = loss_and_gradients(model)
    recompute_blocks(model.blocks, policy)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, plain_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-4, msg=name)

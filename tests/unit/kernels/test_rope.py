"""The fused rotation of queries and keys."""

import pytest
import torch
from support.fused_checks import DEVICE, DTYPES, check_accuracy, check_operator, randn, wants

from megatrain.kernels import rope as module
from megatrain.kernels.rope import fused_rope_qk, rope_angles, rope_qk


def turned(x, cos, sin):
    """As complex numbers: the pair times `cos + i sin`."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat((z.real, z.imag), -1)


def formula(q, k, cos, sin):
    return turned(q, cos, sin), turned(k, cos, sin)


def angles(num_tokens, head_dim, batch=None):
    """Shared by all sequences, or with `batch` each sequence's own."""
    positions = torch.arange(num_tokens)
    if batch is not None:
        positions = torch.stack([positions + 3 * b for b in range(batch)])
    cos, sin = rope_angles(positions, head_dim, 100.0)
    return (cos, sin) if batch is None else (cos[:, None], sin[:, None])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, heads, kv_heads, num_tokens, head_dim",
    [(2, 4, 2, 7, 16), (1, 1, 1, 1, 2), (2, 3, 1, 5, 10), (1, 8, 8, 3, 80)],
)
@pytest.mark.parametrize("own", [False, True])
def test_values_and_gradients(batch, heads, kv_heads, num_tokens, head_dim, own, dtype):
    """Queries and keys are views `[B, T, H, K]` turned to `[B, H, T, K]`, as the model makes them."""
    q, k = (randn(batch, num_tokens, h, head_dim, seed=h).transpose(1, 2) for h in (heads, kv_heads))
    constants = angles(num_tokens, head_dim, batch if own else None)
    check_accuracy(fused_rope_qk, rope_qk, formula, wants(q.detach(), k.detach()), dtype, constants)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[..., ::2], lambda x: x[:, :, :, 1:9], lambda x: x[:, 1:]])
def test_any_strides_and_more_heads_than_a_block(view, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    q, k = view(randn(2, 9, 3, 16)), view(randn(2, 5, 3, 16, seed=1))
    constants = angles(3, q.shape[-1])
    check_accuracy(fused_rope_qk, rope_qk, formula, wants(q.detach(), k.detach()), torch.float32, constants)


def test_results_keep_the_order_of_dimensions():
    """So that what follows, and the projection's gradient, need no copy."""
    q, k = (randn(2, 7, h, 16).float().to(DEVICE).transpose(1, 2).requires_grad_() for h in (4, 2))
    out = fused_rope_qk(q, k, *(a.to(DEVICE) for a in angles(7, 16)))
    assert [y.stride() for y in out] == [q.stride(), k.stride()]


def test_one_angle_for_all_sequences_may_have_four_dimensions():
    q = randn(2, 3, 5, 8).float().to(DEVICE)
    cos, sin = (a.to(DEVICE) for a in angles(5, 8))
    for a, b in zip(fused_rope_qk(q, q, cos[None, None], sin[None, None]), fused_rope_qk(q, q, cos, sin), strict=True):
        assert torch.equal(a, b)


def test_a_bad_number_spoils_its_pair_and_no_other():
    q = randn(1, 1, 2, 8).float().to(DEVICE)
    q[0, 0, 1, 2] = torch.nan
    turned_q, turned_k = fused_rope_qk(q, q.clone(), *(a.to(DEVICE) for a in angles(2, 8)))
    for y in (turned_q, turned_k):
        assert y.isnan().nonzero().tolist() == [[0, 0, 1, 2], [0, 0, 1, 6]]


def test_gradcheck():
    q, k = (randn(1, h, 2, 4).to(DEVICE).requires_grad_() for h in (2, 1))
    cos, sin = (a.to(DEVICE) for a in angles(2, 4))
    assert torch.autograd.gradcheck(lambda q, k: fused_rope_qk(q, k, cos, sin), (q, k))


def test_as_an_operator():
    q, k = wants(randn(2, 4, 3, 8), randn(2, 2, 3, 8))
    cos, sin = (a.to(DEVICE) for a in angles(3, 8))
    theirs = [*(x.detach().float().to(DEVICE).requires_grad_() for x in (q, k)), cos, sin, False]
    check_operator(lambda q, k: fused_rope_qk(q, k, cos, sin), module._rope_qk._opoverload, [q, k], theirs)

"""Fused SwiGLU."""

import pytest
import torch
from support.fused_checks import DEVICE, DTYPES, check_accuracy, check_operator, randn, wants

from megatrain.kernels import swiglu as module
from megatrain.kernels.swiglu import fused_swiglu, swiglu


def formula(gate, up):
    return gate * torch.sigmoid(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 100), (2, 3, 129), (2, 2500), (5, 1), (1, 1), (6,)])
def test_values_and_gradients(shape, dtype):
    inputs = wants(randn(*shape, scale=3), randn(*shape, seed=1))
    check_accuracy(fused_swiglu, swiglu, formula, inputs, dtype)


def test_halves_of_one_projection_and_other_views():
    whole = randn(4, 6, 40)
    for gate, up in [
        whole.chunk(2, -1),
        (whole.transpose(0, 2), whole.transpose(0, 2)),
        (whole[..., ::2], whole[..., 1::2]),
    ]:
        inputs = wants(gate.detach(), up.detach())
        check_accuracy(fused_swiglu, swiglu, formula, inputs, torch.float32)


def test_large_gates_neither_overflow_nor_lose_precision():
    gate = torch.tensor([[-1e4, -100.0, -88.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 88.0, 1e4]], dtype=torch.float64)
    check_accuracy(fused_swiglu, swiglu, formula, wants(gate, randn(1, 10)), torch.float32)


def test_bad_numbers_stay_where_they_are():
    gate = torch.tensor([[torch.nan, 1.0, 1.0, torch.inf, 2.0]], device=DEVICE, requires_grad=True)
    up = torch.tensor([[1.0, torch.nan, torch.inf, 1.0, 2.0]], device=DEVICE, requires_grad=True)
    y = fused_swiglu(gate, up)
    assert y.isnan().tolist() == [[True, True, False, False, False]]
    assert y.isinf().tolist() == [[False, False, True, True, False]]
    d_gate, d_up = torch.autograd.grad(y.sum(), [gate, up])
    assert not d_gate[0, :2].isfinite().any() and d_up[0, 0].isnan() and d_gate[0, 4].isfinite()


def test_gradcheck():
    gate, up = (randn(3, 5, seed=i).to(DEVICE).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(fused_swiglu, (gate, up))


def test_as_an_operator():
    check_operator(fused_swiglu, module._swiglu._opoverload, wants(randn(6, 24), randn(6, 24, seed=1)))


def test_no_rows_is_nothing_to_do():
    empty = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    assert fused_swiglu(empty, empty).shape == (0, 8)

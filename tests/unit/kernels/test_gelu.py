"""Fused GELU."""

import math

import pytest
import torch
from support.fused_checks import DEVICE, DTYPES, check_accuracy, check_operator, randn, wants

from megatrain.kernels import gelu as module
from megatrain.kernels.gelu import fused_gelu, gelu


def formula(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 100), (2, 3, 129), (2, 2500), (5, 1), (1, 1), (6,)])
def test_values_and_gradients(shape, dtype):
    check_accuracy(fused_gelu, gelu, formula, wants(randn(*shape, scale=2)), dtype)


@pytest.mark.parametrize("view", [lambda x: x[..., 3:36], lambda x: x.transpose(0, 2), lambda x: x[..., ::2]])
def test_views_of_larger_tensors(view):
    check_accuracy(fused_gelu, gelu, formula, wants(view(randn(4, 6, 40)).detach()), torch.float32)


def test_large_numbers_neither_overflow_nor_lose_precision():
    for x in (-1e4, -100.0, -10.0, -5.0, -1e-6, 0.0, 1e-6, 3.0, 5.0, 100.0, 1e4):
        exact = formula(torch.tensor(x, dtype=torch.float64)).item()
        value = torch.full((1, 3), x, device=DEVICE, requires_grad=True)
        y = fused_gelu(value)
        assert y[0].tolist() == pytest.approx([exact] * 3, rel=2e-5, abs=1e-7)
        slope = torch.autograd.grad(y.sum(), value)[0]
        one = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        expected = torch.autograd.grad(formula(one), one)[0].item()
        assert slope[0].tolist() == pytest.approx([expected] * 3, rel=2e-5, abs=1e-7)


def test_bad_numbers_stay_where_they_are():
    x = torch.tensor([[torch.nan, torch.inf, 2.0]], device=DEVICE, requires_grad=True)
    y = fused_gelu(x)
    assert y[0, 0].isnan() and y[0, 1].isinf() and y[0, 2].isfinite()
    slope = torch.autograd.grad(y.sum(), x)[0]
    assert slope[0, 0].isnan() and slope[0, 2].isfinite()


def test_gradcheck():
    assert torch.autograd.gradcheck(fused_gelu, (randn(3, 5).to(DEVICE).requires_grad_(),))


def test_as_an_operator():
    check_operator(fused_gelu, module._gelu._opoverload, wants(randn(6, 24)))

"""Fused LayerNorm, alone and after a residual addition, with and without bias."""

import pytest
import torch
from support.fused_checks import (
    DEVICE,
    DTYPES,
    check_accuracy,
    check_operator,
    error,
    randn,
    values_and_gradients,
    wants,
)

from megatrain.kernels import layer_norm as module
from megatrain.kernels import norms
from megatrain.kernels.layer_norm import add_layer_norm, fused_add_layer_norm, fused_layer_norm, layer_norm

SHAPES = [(7, 100), (2, 3, 129), (1, 300), (3, 2), (40, 64)]


def formula(x, weight, bias, eps):
    mean = x.mean(-1, keepdim=True)
    n = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    return n * weight if bias is None else n * weight + bias


def add_formula(x, residual, weight, bias, eps):
    return formula(x + residual, weight, bias, eps), x + residual


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, with_bias):
    x, weight, bias = wants(randn(*shape), randn(shape[-1]), randn(shape[-1], seed=4))
    check_accuracy(fused_layer_norm, layer_norm, formula, [x, weight, bias if with_bias else None, 1e-2], dtype)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_after_an_addition(dtype, with_bias):
    """In 16 bits the total is rounded before it is normalised, so float64 starts from that total."""
    x, residual = (randn(5, 70, seed=i).mul(8).round().div(8) for i in (1, 2))  # their sum is exact in 16 bits
    x, residual, weight, bias = wants(x, residual, randn(70), randn(70, seed=4))
    inputs = [x, residual, weight, bias if with_bias else None, 1e-3]
    check_accuracy(fused_add_layer_norm, add_layer_norm, add_formula, inputs, dtype)


def test_a_program_sums_the_gradients_of_weight_and_bias_of_many_rows(monkeypatch):
    monkeypatch.setattr(norms, "num_programs", lambda _: 2)
    for shape in ((9, 1025), (75, 100)):
        inputs = [*wants(randn(*shape), randn(shape[-1]), randn(shape[-1], seed=1)), 1e-3]
        check_accuracy(fused_layer_norm, layer_norm, formula, inputs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_after_an_addition_the_norm_reads_the_rounded_total(dtype):
    """As many elements as nothing but another order of summation explains may differ from the reference's."""
    x, residual, weight = (randn(*s, seed=i).to(dtype).to(DEVICE) for i, s in enumerate([(9, 96), (9, 96), (96,)]))
    ours, theirs = (f(x, residual, weight, None, 1e-5) for f in (fused_add_layer_norm, add_layer_norm))
    assert torch.equal(ours[1], theirs[1])
    assert (ours[0] != theirs[0]).float().mean() < 0.01


@pytest.mark.parametrize("view", ["columns", "transposed", "every second"])
def test_views_of_larger_tensors(view):
    whole = randn(12, 10, 40)
    x = {"columns": whole[..., 3:36], "transposed": whole.transpose(0, 2), "every second": whole[..., ::2]}[view]
    inputs = [*wants(x.detach(), randn(x.shape[-1]), randn(x.shape[-1], seed=1)), 1e-3]
    check_accuracy(fused_layer_norm, layer_norm, formula, inputs, torch.float32)


def test_one_column_is_the_bias_whatever_it_holds():
    x = randn(4, 1).float().to(DEVICE).requires_grad_()
    weight, bias = torch.full((1,), 3.0, device=DEVICE), torch.full((1,), 2.0, device=DEVICE)
    y = fused_layer_norm(x, weight, bias, 1e-5)
    assert torch.equal(y, torch.full((4, 1), 2.0, device=DEVICE))
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], torch.zeros(4, 1, device=DEVICE))


@pytest.mark.parametrize("scale, mean", [(1.0, 1e4), (1e-6, 0.0), (1e4, -1e4), (1e-2, 3.0)])
def test_large_means_and_tiny_variances_cost_no_more_than_in_pytorch(scale, mean):
    """fp32 itself cannot hold the mean better than half a unit of its last place."""
    x = (randn(3, 400) * scale + mean).float().to(DEVICE).requires_grad_()
    weight = randn(400).float().to(DEVICE).requires_grad_()
    g = [randn(3, 400, seed=9)]
    exact_in = [t.detach().cpu().double().requires_grad_() for t in (x, weight)]
    exact = values_and_gradients(formula, [*exact_in, None, 1e-12], g)
    ours, theirs = (values_and_gradients(f, [x, weight, None, 1e-12], g) for f in (fused_layer_norm, layer_norm))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert error(a, c) <= max(1e-5, 2 * error(b, c)), (error(a, c), error(b, c))


def test_a_bad_number_spoils_its_row_and_no_other():
    x = randn(3, 50).float().to(DEVICE)
    x[0, 7], x[1, 9] = torch.nan, torch.inf
    x.requires_grad_()
    weight, bias = (torch.ones(50, device=DEVICE, requires_grad=True) for _ in range(2))
    y, total = fused_add_layer_norm(x, torch.zeros_like(x), weight, bias, 1e-5)
    assert y[:2].isnan().all() and y[2].isfinite().all()
    assert total[0, 7].isnan() and total[1, 9].isinf()
    d_x, d_weight = torch.autograd.grad(y.sum(), [x, weight])
    assert d_x[:2].isnan().all() and d_x[2].isfinite().all() and d_weight.isnan().all()


def test_gradcheck():
    x, residual, weight, bias = (randn(*s, seed=1).to(DEVICE).requires_grad_() for s in [(3, 5), (3, 5), (5,), (5,)])
    assert torch.autograd.gradcheck(lambda *a: fused_layer_norm(*a, 1e-2), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *a: fused_add_layer_norm(*a, 1e-2), (x, residual, weight, bias))


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_nobody_uses_has_no_gradient(used):
    inputs = [randn(*s, seed=1).float().to(DEVICE).requires_grad_() for s in [(3, 5), (3, 5), (5,), (5,)]]
    ours, theirs = (f(*inputs, 1e-2)[used] for f in (fused_add_layer_norm, add_layer_norm))
    a, b = (torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) for y in (ours, theirs))
    for i, j in zip(a, b, strict=True):
        assert (i is None) == (j is None)
        if i is not None:
            torch.testing.assert_close(i, j, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("add, with_bias", [(False, True), (True, False)])
def test_as_an_operator(add, with_bias):
    x, residual, weight, bias = wants(randn(6, 24), randn(6, 24, seed=1), randn(24), randn(24, seed=2))
    bias = bias if with_bias else None
    if add:
        operator = module._add_layer_norm._opoverload
        check_operator(fused_add_layer_norm, operator, [x, residual, weight, bias, 1e-3])
    else:
        check_operator(fused_layer_norm, module._layer_norm._opoverload, [x, weight, bias, 1e-3])

"""Fused RMSNorm, alone and after a residual addition."""

import pytest
import torch
from support.fused_checks import DEVICE, DTYPES, check_accuracy, check_operator, randn, wants

from megatrain.kernels import norms
from megatrain.kernels import rms_norm as module
from megatrain.kernels.rms_norm import add_rms_norm, fused_add_rms_norm, fused_rms_norm, rms_norm
from megatrain.kernels.support import KernelError

SHAPES = [(7, 100), (2, 3, 129), (1, 300), (5, 1), (1, 1), (40, 64)]


def eps_for(shape):
    """Large for one column, whose d_x is all cancellation: `r h (1 - n^2)` with n near 1."""
    return 1e-3 if shape[-1] > 1 else 0.5


def formula(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def add_formula(x, residual, weight, eps):
    return formula(x + residual, weight, eps), x + residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype):
    inputs = [*wants(randn(*shape), randn(shape[-1])), eps_for(shape)]
    check_accuracy(fused_rms_norm, rms_norm, formula, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_after_an_addition(shape, dtype):
    """In 16 bits the total is rounded before it is normalised, so float64 starts from that total."""
    x, residual = (randn(*shape, seed=i).mul(8).round().div(8) for i in (1, 2))  # their sum is exact in 16 bits
    inputs = [*wants(x, residual, randn(shape[-1])), eps_for(shape)]
    check_accuracy(fused_add_rms_norm, add_rms_norm, add_formula, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_values_in_16_bits_are_the_references_bit_for_bit(dtype):
    x, residual, weight = (randn(*s, seed=i).to(dtype).to(DEVICE) for i, s in enumerate([(9, 96), (9, 96), (96,)]))
    ours, theirs = fused_add_rms_norm(x, residual, weight, 1e-5), add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(ours[1], theirs[1])
    # Each sums in its own order: now and then one falls on the other side of a rounding.
    assert (ours[0] != theirs[0]).float().mean() < 0.01


def test_an_fp32_weight_makes_the_result_fp32_as_in_the_reference():
    x, weight = randn(4, 32).bfloat16().to(DEVICE), randn(32).float().to(DEVICE)
    ours, theirs = fused_rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


def test_a_program_sums_the_weight_gradient_of_many_rows(monkeypatch):
    monkeypatch.setattr(norms, "num_programs", lambda _: 2)
    for shape in ((9, 1025), (75, 100)):
        inputs = [*wants(randn(*shape), randn(shape[-1])), 1e-3]
        check_accuracy(fused_rms_norm, rms_norm, formula, inputs, torch.float32)


@pytest.mark.parametrize("view", ["columns", "transposed", "every second"])
def test_views_of_larger_tensors(view):
    whole = randn(12, 10, 40)
    x = {"columns": whole[..., 3:36], "transposed": whole.transpose(0, 2), "every second": whole[..., ::2]}[view]
    inputs = [*wants(x.detach(), randn(x.shape[-1])), 1e-3]
    check_accuracy(fused_rms_norm, rms_norm, formula, inputs, torch.float32)


def test_rows_of_extreme_size():
    rows = torch.stack([randn(200) * scale for scale in (1e-8, 1e4, 1e-3, 1e15)])
    for row in rows:
        inputs = [*wants(row[None], randn(200)), 1e-12]
        check_accuracy(fused_rms_norm, rms_norm, formula, inputs, torch.float32)


def test_a_bad_number_spoils_its_row_and_no_other():
    x = randn(3, 50).float().to(DEVICE)
    x[0, 7], x[1, 9] = torch.nan, torch.inf
    x.requires_grad_()
    weight = torch.ones(50, device=DEVICE, requires_grad=True)
    y, total = fused_add_rms_norm(x, torch.zeros_like(x), weight, 1e-5)
    assert y[0].isnan().all() and y[1, 9].isnan() and y[2].isfinite().all()
    assert total[0, 7].isnan() and total[1, 9].isinf()
    d_x, d_weight = torch.autograd.grad(y.sum(), [x, weight])
    assert d_x[0].isnan().all() and d_x[1, 9].isnan() and d_x[2].isfinite().all() and d_weight.isnan().all()


def test_gradcheck():
    x, residual, weight = (randn(*s, seed=1).to(DEVICE).requires_grad_() for s in [(3, 5), (3, 5), (5,)])
    assert torch.autograd.gradcheck(lambda x, w: fused_rms_norm(x, w, 1e-2), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: fused_add_rms_norm(*a, 1e-2), (x, residual, weight))


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_nobody_uses_has_no_gradient(used):
    x, residual, weight = (randn(*s, seed=1).float().to(DEVICE).requires_grad_() for s in [(3, 5), (3, 5), (5,)])
    ours, theirs = (f(x, residual, weight, 1e-2)[used] for f in (fused_add_rms_norm, add_rms_norm))
    a, b = (torch.autograd.grad(y.square().sum(), [x, residual, weight], allow_unused=True) for y in (ours, theirs))
    for i, j in zip(a, b, strict=True):
        assert (i is None) == (j is None)
        if i is not None:
            torch.testing.assert_close(i, j)


@pytest.mark.parametrize("add", [False, True])
def test_as_an_operator(add):
    x, residual, weight = wants(randn(6, 24), randn(6, 24, seed=1), randn(24))
    if add:
        check_operator(fused_add_rms_norm, module._add_rms_norm._opoverload, [x, residual, weight, 1e-3])
    else:
        check_operator(fused_rms_norm, module._rms_norm._opoverload, [x, weight, 1e-3])


def test_no_rows_is_nothing_to_do_and_too_wide_a_row_an_error():
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    y = fused_rms_norm(torch.empty(0, 8, device=DEVICE, requires_grad=True), weight, 1e-5)
    assert y.shape == (0, 8)
    assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], torch.zeros(8, device=DEVICE))
    wide = torch.ones(1, 70000, device=DEVICE)
    with pytest.raises(KernelError, match="70000"):
        fused_rms_norm(wide, wide[0], 1e-5)

"""Linear layers whose products oneDNN makes, against float64; and which CPU gets them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.fused_checks import DTYPES, check_accuracy, check_operator, error, randn, wants
from torch.nn import functional as F

from megatrain.kernels import linear as module
from megatrain.kernels.linear import add_product_, linear, onednn_linear, prefers_onednn, product


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN at every size on any x86, and the sizes of what it was asked for."""
    asked = []
    multiply = module._onednn

    def counted(a, b, bias=None):
        asked.append((len(a), a.shape[1], b.shape[1]))
        return multiply(a, b, bias)

    monkeypatch.setattr(module, "prefers_onednn", lambda: True)
    monkeypatch.setattr(module, "_SMALLEST", 1)
    monkeypatch.setattr(module, "_onednn", counted)
    return asked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((7, 100), 33),
        ((2, 3, 129), 65),
        ((1, 64), 17),
        ((5, 1), 8),
        ((5, 16), 1),
        ((6,), 4),
        ((0, 8), 3),
        ((300, 50), 40),
    ],
)
def test_values_and_gradients(shape, width, has_bias, dtype, onednn):
    inputs = wants(randn(*shape), randn(width, shape[-1], scale=shape[-1] ** -0.5))
    inputs += wants(randn(width)) if has_bias else [None]
    check_accuracy(onednn_linear, linear, F.linear, inputs, dtype)
    rows = torch.Size(shape[:-1]).numel()
    assert len(onednn) == (3 if dtype == torch.float32 and min(rows, shape[-1], width) > 1 else 0)


def test_products_as_wide_as_a_vocabulary(onednn):
    check_accuracy(
        onednn_linear, linear, F.linear, [*wants(randn(9, 24), randn(50257, 24, scale=0.2)), None], torch.float32
    )
    assert len(onednn) == 3


@pytest.mark.parametrize(
    "view", [lambda x: x[..., 3:36], lambda x: x.transpose(0, 2), lambda x: x[::2], lambda x: x[..., ::2]]
)
def test_views_of_larger_tensors(view, onednn):
    x = view(randn(8, 6, 40)).detach()
    check_accuracy(onednn_linear, linear, F.linear, [*wants(x, randn(12, x.shape[-1])), None], torch.float32)
    assert len(onednn) == 3


def test_only_the_gradients_that_are_wanted_are_made(onednn):
    x, weight = randn(8, 16).float(), randn(4, 16).float()
    (found,) = torch.autograd.grad(onednn_linear(x, weight.requires_grad_()).sum(), weight)
    assert len(onednn) == 2 and error(found, x.double().sum(0).expand(4, 16)) < 1e-6
    onednn.clear()
    torch.autograd.grad(onednn_linear(x.requires_grad_(), weight.detach()).sum(), x)
    assert onednn == [(8, 16, 4), (8, 4, 16)]


def test_factors_with_gaps_are_made_dense(onednn, monkeypatch):
    """oneDNN multiplies by one with gaps between its rows in plain loops, hundreds of times as slow."""
    seen = []
    operator = torch.ops.mkldnn._linear_pointwise

    def watched(a, b, *others):
        seen.append(b.is_contiguous() or b.t().is_contiguous())
        return operator(a, b, *others)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched)
    a, b = randn(12, 20).float(), randn(20, 60).float()
    for factor in (b[:, 5:37], b.t().contiguous()[5:37].t(), b[:, ::2]):
        assert error(product(a, factor), a.double() @ factor.double()) < 1e-6
    assert seen == [True] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [5, 2500])
def test_products_are_added_block_by_block(rows, dtype, onednn):
    a, b, total = randn(20, rows).to(dtype).t(), randn(20, 7).to(dtype), randn(rows, 7).float()
    exact = a.double() @ b.double()
    before = total.double()
    assert add_product_(total, a, b) is total and error(total, before + exact) < 1e-6
    poison = torch.full_like(total, torch.nan)
    assert error(add_product_(poison, a, b, accumulate=False), exact) < 1e-6
    assert len(onednn) == 2 * -(-rows // module._BLOCK)


def test_small_products_and_other_dtypes_stay_torchs(onednn, monkeypatch):
    monkeypatch.setattr(module, "_SMALLEST", 2**22)
    x = randn(64, 64).float()
    assert torch.equal(product(x, x), x @ x)
    assert torch.equal(product(x, x, out=torch.empty(64, 64)), x @ x)
    assert torch.equal(product(x.double(), x.double()), x.double() @ x.double())
    assert not onednn


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_stay_where_they_are(bad, onednn):
    x, weight = randn(40, 32).float(), randn(24, 32).float()
    x[3, 5] = bad
    y = onednn_linear(x, weight.requires_grad_())
    assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert not gradient[:, 5].isfinite().any() and gradient[:, :5].isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_numbers(scale, onednn):
    a, b = randn(30, 40, scale=scale).float(), randn(40, 20).float()
    assert error(product(a, b), a.double() @ b.double()) < 1e-6


def test_gradcheck():
    assert torch.autograd.gradcheck(onednn_linear, tuple(wants(randn(2, 3, 5), randn(4, 5), randn(4))))


def test_as_an_operator(onednn):
    check_operator(onednn_linear, module._linear._opoverload, wants(randn(6, 24), randn(10, 24), randn(10)))
    assert onednn


@pytest.mark.parametrize(
    ("capability", "vendor", "expected"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX2", "AuthenticAMD", False),
        ("AVX512", "GenuineIntel", False),
        ("AVX512", None, False),
    ],
)
def test_a_cpu_with_avx512_that_is_not_intels_prefers_onednn(capability, vendor, expected, monkeypatch):
    def read(path, *arguments, **options):
        assert path == Path("/proc/cpuinfo")
        if vendor is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nvendor_id\t: {vendor}\n"

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "read_text", read)
    prefers_onednn.cache_clear()
    try:
        assert prefers_onednn() is expected
    finally:
        prefers_onednn.cache_clear()

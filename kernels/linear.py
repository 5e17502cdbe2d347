"""Matrix products: torch's default, and oneDNN's in fp32 on CPUs where it is faster.

On x86, torch multiplies fp32 matrices with MKL, which uses at most AVX2 on non-Intel processors. oneDNN, which is part
of torch, uses AVX-512 wherever the processor has it: on an AMD EPYC it took half the time
(docs/measurements/kernels.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from megatrain.kernels.support import as_rows

_SMALLEST = 2**22
"""Smallest product, in multiplications, that goes to oneDNN. For smaller ones the call costs more than it gains."""

_BLOCK = 512
"""Rows of a tall result to compute at a time, so that the copied part of a transposed factor stays in the cache."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x weight^T + bias`, `[..., N]`, for `x` `[..., K]`, `weight` `[N, K]` and `bias` `[N]` or None.

    All have one dtype.

    Gradients, with sums over all rows: `d_x = g weight`, `d_weight = g^T x`, `d_bias = sum(g)`.
    """
    return F.linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `linear` with `product`, forward and backward. Any device and dtype, but no distributed tensors."""
    if x.numel() * len(weight) < _SMALLEST:  # calling a custom operator has a cost too
        return F.linear(x, weight, bias)
    result: Tensor = _linear(x, weight, bias)
    return result


@cache
def prefers_onednn() -> bool:
    """Return whether oneDNN should compute fp32 products on this CPU: it has AVX-512, and MKL would not use it.

    The processor decides, not a timing: timings are noisy, and a repeated run must give the same bits.
    """
    is_available: Callable[[], bool] = torch.backends.mkldnn.is_available  # torch does not type it
    if not is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the matrix product `a b`, in `out` if given. Large fp32 ones use oneDNN where `prefers_onednn`."""
    if not _is_onednn(a, b):
        return torch.mm(a, b, out=out)
    return _onednn(a, b) if out is None else out.copy_(_onednn(a, b))


def add_product_(total: Tensor, a: Tensor, b: Tensor, accumulate: bool = True) -> Tensor:
    """Add the matrix product `a b` to `total`, or without `accumulate` overwrite it; return `total`.

    Computed in `total`'s dtype. Like `product`, but for results with many rows.
    """
    b = b.to(total.dtype)
    if not _is_onednn(a, b, total.dtype):
        return torch.addmm(total, a.to(total.dtype), b, beta=int(accumulate), out=total)
    for start in range(0, len(a), _BLOCK):
        rows = total[start : start + _BLOCK]
        factor = a[start : start + _BLOCK].t().contiguous().t()  # oneDNN transposes a dense matrix faster
        part = _onednn(factor.to(total.dtype), b)
        rows.add_(part) if accumulate else rows.copy_(part)
    return total


def _is_onednn(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return whether oneDNN should multiply `a` and `b` in `dtype` (by default that of `a`)."""
    return (
        (dtype or a.dtype) == torch.float32
        and a.device.type == "cpu"
        and len(a) * a.shape[1] * b.shape[1] >= _SMALLEST
        and min(*a.shape, b.shape[1]) > 1
        and prefers_onednn()
    )


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `a b + bias`. Copies `b` if its rows have gaps, because oneDNN would then fall back to plain loops."""
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return result


@library.custom_op("megatrain::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = as_rows(x)
    if not _is_onednn(rows, weight.t()):
        return F.linear(x, weight, bias)
    return _onednn(rows, weight.t(), bias).view(*x.shape[:-1], len(weight))


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@library.custom_op("megatrain::linear_backward", mutates_args=())
def _linear_backward(
    g: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `x`, `weight` and the bias; one that is not needed is empty."""
    rows = as_rows(g)
    d_x = product(rows, weight).view(x.shape) if need_x else g.new_empty(0)
    d_weight = product(rows.t(), as_rows(x)) if need_weight else g.new_empty(0)
    return d_x, d_weight, rows.sum(0) if need_bias else g.new_empty(0)


@_linear_backward.register_fake
def _(
    g: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = x.new_empty(x.shape if need_x else 0)
    d_weight = weight.new_empty(weight.shape if need_weight else 0)
    return d_x, d_weight, g.new_empty(len(weight) if need_bias else 0)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    d_x, d_weight, d_bias = _linear_backward(g, x, weight, need_x, need_weight, need_bias)
    return d_x if need_x else None, d_weight if need_weight else None, d_bias if need_bias else None


_linear.register_autograd(_gradient, setup_context=_save)

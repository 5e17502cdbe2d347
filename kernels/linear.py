"""Matrix products: torch's own, and on a CPU in fp32 oneDNN's where those are faster.

torch multiplies fp32 matrices on x86 with MKL, which uses no more than AVX2 on processors of other makers than Intel.
oneDNN, part of the same torch, uses AVX-512 wherever the processor has it: on an AMD EPYC it took half the time
(docs/measurements/kernels.md).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from megatrain.kernels.support import as_rows

_SMALLEST = 2**22
"""Multiplications in a product below which calling oneDNN costs what it gains."""

_BLOCK = 512
"""Rows of a tall result that are computed at a time: what is copied of a transposed factor for them stays in the
cache."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`: `x` `[..., K]`, `weight` `[N, K]`, `bias` `[N]` or None, of one dtype; returns `[..., N]`.

    Gradients, with sums over all rows: `d_x = g weight`, `d_weight = g^T x`, `d_bias = sum(g)`.
    """
    return F.linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` with its three products by `product`: any device and dtype, tensors that are not distributed."""
    if x.numel() * len(weight) < _SMALLEST:  # the operator has its price too
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias)


@cache
def prefers_onednn() -> bool:
    """Whether fp32 products on this CPU are oneDNN's: there is AVX-512, and MKL would not use it.

    Asks the machine and not a clock, which noise could turn: the same run must give the same bits again.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """`a b` of two matrices, into `out` where given: by oneDNN where that `prefers_onednn`, for large ones in fp32."""
    if not _is_onednn(a, b):
        return torch.mm(a, b, out=out)
    return _onednn(a, b) if out is None else out.copy_(_onednn(a, b))


def add_product_(total: Tensor, a: Tensor, b: Tensor, accumulate: bool = True) -> Tensor:
    """`total += a b`, or `total = a b`, of matrices, computed in `total`'s dtype: `product` for many rows. Returns
    `total`."""
    b = b.to(total.dtype)
    if not _is_onednn(a, b, total.dtype):
        return torch.addmm(total, a.to(total.dtype), b, beta=int(accumulate), out=total)
    for start in range(0, len(a), _BLOCK):
        rows = total[start : start + _BLOCK]
        factor = a[start : start + _BLOCK].t().contiguous().t()  # oneDNN turns faster what is dense
        part = _onednn(factor.to(total.dtype), b)
        rows.add_(part) if accumulate else rows.copy_(part)
    return total


def _is_onednn(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether oneDNN multiplies these, in `dtype` (theirs unless given)."""
    return (
        (dtype or a.dtype) == torch.float32
        and a.device.type == "cpu"
        and len(a) * a.shape[1] * b.shape[1] >= _SMALLEST
        and min(*a.shape, b.shape[1]) > 1
        and prefers_onednn()
    )


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a b + bias`. The second factor must be dense: with gaps between its rows oneDNN falls back to plain loops."""
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
    """The gradients of `x`, `weight` and the bias; empty, where nobody needs one."""
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

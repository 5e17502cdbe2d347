"""RMSNorm, alone and after a residual addition: the plain references, and the versions fused into one pass.

The modules and their parameters are in megatrain/model/gpt.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatrain.kernels.norms import empty_statistic, launch_backward, launch_forward, partial_gradients
from megatrain.kernels.support import jit, rounded, tl


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    `x` is `[..., D]`, `weight` `[D]`; returns `[..., D]` in the wider of their dtypes. For 16-bit `x` the mean and the
    division are computed in fp32, and the result is rounded to `x`'s dtype before it is multiplied by the weight, as in
    Llama (Zhang and Sennrich, 2019, arXiv:1910.07467).

    Gradients, with `r = 1/sqrt(mean(x^2) + eps)`, `n = x * r` and `g` the gradient of the output:
    `d_weight = sum(g * n)` over all but the last dimension, and
    `d_x = r * (g * weight - n * mean(g * weight * n))`, the mean over the last dimension.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `(rms_norm(total), total)` with `total = x + residual`, the residual stream's update in a block.

    `x` and `residual` are `[..., D]` of one dtype, `weight` `[D]`; both results are `[..., D]`.

    Gradients, with `d_norm` the gradient of `rms_norm`'s input and `g_total` the gradient of `total`:
    `d_x = d_residual = d_norm + g_total`; `d_weight` is as for `rms_norm`.
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` in one pass forward and one backward.

    Sums are fp32 (fp64 for fp64 inputs), and `d_x` has one rounding less than in the reference.

    Raises:
        KernelError: Triton cannot take these tensors (`support.unsupported(x, weight, row=D)`).
    """
    normed: Tensor = _rms_norm(x, weight, eps)[0]
    return normed


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` in one pass forward and one backward, which handles the gradients of both results."""
    normed, total, _ = _add_rms_norm(x, residual, weight, eps)
    return normed, total


@jit
def _forward(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Normalise ROWS whole rows; store each row's r in `scale`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < width)
    values = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(COMPUTE)
    if ADD:
        values += tl.load(residual + rows * residual_stride + columns, mask=inside, other=0.0).to(COMPUTE)
        stored = rounded(values, total.dtype.element_ty)
        tl.store(total + rows * width + columns, stored, mask=inside)
        values = stored.to(COMPUTE)  # the norm reads the rounded total
    r = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / width + EPS)
    tl.store(scale + row, r, mask=row < num_rows)
    n = rounded(values * r[:, None], x.dtype.element_ty).to(COMPUTE)
    w = tl.load(weight + columns, mask=columns < width, other=0.0).to(COMPUTE)
    tl.store(normed + rows * width + columns, rounded(n * w, normed.dtype.element_ty), mask=inside)


@jit
def _backward(
    g: tl.tensor,
    g_total: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    d_x: tl.tensor,
    d_weight: tl.tensor,
    g_stride: tl.tensor,
    g_total_stride: tl.tensor,
    x_stride: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    ADD: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute d_x of every num_programs-th group of ROWS rows, and those rows' part of d_weight.

    Each program writes one row of `d_weight`.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + columns, mask=columns < width, other=0.0).to(COMPUTE)
    share = tl.zeros([ROWS, BLOCK], dtype=COMPUTE)
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        rows = row[:, None]
        inside = (rows < num_rows) & (columns < width)
        r = tl.load(scale + row, mask=row < num_rows, other=0.0).to(COMPUTE)[:, None]
        n = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(COMPUTE) * r
        gradient = tl.load(g + rows * g_stride + columns, mask=inside, other=0.0).to(COMPUTE)
        h = gradient * w
        d = r * (h - n * (tl.sum(h * n, axis=1) / width)[:, None])
        if ADD:
            d += tl.load(g_total + rows * g_total_stride + columns, mask=inside, other=0.0).to(COMPUTE)
        tl.store(d_x + rows * width + columns, rounded(d, d_x.dtype.element_ty), mask=inside)
        share += gradient * rounded(n, x.dtype.element_ty).to(COMPUTE)  # forward multiplied the weight by the rounded n
    tl.store(d_weight + program * width + columns, tl.sum(share, axis=0)[None, :], mask=columns < width)


def _normed_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the reference's result: 16-bit values times an fp32 weight are fp32."""
    return torch.promote_types(x.dtype, weight.dtype)


def _run_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised rows, the total (meaningless without `residual`), and each row's `r`."""
    normed, scale = x.new_empty(x.shape, dtype=_normed_dtype(x, weight)), empty_statistic(x, weight)
    total = launch_forward(_forward, x, residual, (weight.contiguous(),), normed, (scale,), eps)
    return normed, total, scale


@torch.library.custom_op("megatrain::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised `x`, and each row's `r` for the backward pass."""
    normed, _, scale = _run_forward(x, None, weight, eps)
    return normed, scale


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=_normed_dtype(x, weight)), empty_statistic(x, weight)


@torch.library.custom_op("megatrain::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised total, the total, and each row's `r` for the backward pass."""
    return _run_forward(x, residual, weight, eps)


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    normed = x.new_empty(x.shape, dtype=_normed_dtype(x, weight))
    return normed, x.new_empty(x.shape), empty_statistic(x, weight)


@torch.library.custom_op("megatrain::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    g: Tensor, g_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `d_x`, which includes `g_total` if given, and `d_weight`."""
    (partials,) = partial_gradients(x, scale, 1)
    d_x = launch_backward(_backward, g, g_total, x, weight, (scale,), (partials,))
    return d_x, partials.sum(0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(g: Tensor, g_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # a missing gradient stays None, which saves a pass over zeros
    source = inputs[0] if len(inputs) == 3 else output[1]
    ctx.save_for_backward(source, inputs[-2], output[-1])


def _rms_norm_gradient(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return None, None, None
    x, weight, scale = ctx.saved_tensors
    return *_rms_norm_backward(g, None, x, weight, scale), None


def _add_rms_norm_gradient(
    ctx: Any, g: Tensor | None, g_total: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if g is None:
        return g_total, g_total, None, None
    total, weight, scale = ctx.saved_tensors
    d_total, d_weight = _rms_norm_backward(g, g_total, total, weight, scale)
    return d_total, d_total, d_weight, None


_rms_norm.register_autograd(_rms_norm_gradient, setup_context=_save)
_add_rms_norm.register_autograd(_add_rms_norm_gradient, setup_context=_save)

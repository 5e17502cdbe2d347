"""RMSNorm, alone and after a residual addition: the plain references, and each in one fused pass over memory.

No module, no parameters: those belong to the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatrain.kernels.support import (
    as_rows,
    ceil_div,
    compute_dtype,
    compute_type,
    launch,
    next_power_of_2,
    num_programs,
    num_warps,
    require,
    rounded,
    tl,
    triton,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, 2019, arXiv:1910.07467).

    `x` is `[..., D]`, `weight` `[D]`; returns `[..., D]` in `x`'s dtype. For 16-bit `x` the mean and the division are
    taken in fp32 and the result is rounded to `x`'s dtype before the weight multiplies it, as Llama does.

    Gradients, with `r = 1/sqrt(mean(x^2) + eps)`, `n = x * r` and `g` the gradient of the output:
    `d_weight = sum(g * n)` over all but the last dimension, and
    `d_x = r * (g * weight - n * mean(g * weight * n))`, the mean over the last dimension.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(rms_norm(total), total)` with `total = x + residual`: what a block does to the residual stream.

    `x` and `residual` are `[..., D]` of one dtype, `weight` `[D]`; both results are `[..., D]`.

    Gradients, with `d_norm` what `rms_norm` gives for its input and `g_total` the gradient of `total`:
    `d_x = d_residual = d_norm + g_total`; `d_weight` is `rms_norm`'s.
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in one pass forward and one backward. Sums in fp32 (fp64 for fp64), one rounding less in `d_x`.

    Raises `KernelError` where Triton cannot take these tensors (`support.unsupported(x, weight, row=D)`).
    """
    normed, _ = _rms_norm(x, weight, eps)
    return normed


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in one pass forward, and one backward for the gradients of both results together."""
    normed, total, _ = _add_rms_norm(x, residual, weight, eps)
    return normed, total


@triton.jit
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
    """Normalises ROWS whole rows; `scale` gets each row's r."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < width)
    values = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(COMPUTE)
    if ADD:
        values += tl.load(residual + rows * residual_stride + columns, mask=inside, other=0.0).to(COMPUTE)
        stored = rounded(values, total.dtype.element_ty)
        tl.store(total + rows * width + columns, stored, mask=inside)
        values = stored.to(COMPUTE)  # the norm reads what the residual stream holds
    r = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / width + EPS)
    tl.store(scale + row, r, mask=row < num_rows)
    n = rounded(values * r[:, None], x.dtype.element_ty).to(COMPUTE)
    w = tl.load(weight + columns, mask=columns < width, other=0.0).to(COMPUTE)
    tl.store(normed + rows * width + columns, rounded(n * w, normed.dtype.element_ty), mask=inside)


@triton.jit
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
    """d_x of every num_programs-th group of ROWS rows, and those rows' share of d_weight: one row of `d_weight`."""
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
        share += gradient * rounded(n, x.dtype.element_ty).to(COMPUTE)  # the weight multiplied the rounded n
    tl.store(d_weight + program * width + columns, tl.sum(share, axis=0)[None, :], mask=columns < width)


def _blocks(width: int) -> dict[str, int]:
    """Whole rows in a program; narrow ones (a head's) several at a time."""
    block = next_power_of_2(width)
    rows = max(1, 2048 // block)
    return {"BLOCK": block, "ROWS": rows, "num_warps": num_warps(block * rows)}


def _normed_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The reference's: 16-bit values times an fp32 weight are fp32."""
    return torch.promote_types(x.dtype, weight.dtype)


@torch.library.custom_op("megatrain::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised `x`, and every row's `r` for the backward pass."""
    require(x, weight, row=x.shape[-1])
    rows, weight, blocks = as_rows(x), weight.contiguous(), _blocks(x.shape[-1])
    normed = x.new_empty(x.shape, dtype=_normed_dtype(x, weight))
    scale = x.new_empty(x.shape[:-1], dtype=compute_dtype(x, weight))
    num_rows, width = rows.shape
    launch(
        _forward,
        (ceil_div(num_rows, blocks["ROWS"]),),
        *(rows, rows, weight, normed, normed, scale, rows.stride(0), 0, num_rows, width),
        EPS=eps,
        ADD=False,
        COMPUTE=compute_type(x, weight),
        **blocks,
    )
    return normed, scale


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed = x.new_empty(x.shape, dtype=_normed_dtype(x, weight))
    return normed, x.new_empty(x.shape[:-1], dtype=compute_dtype(x, weight))


@torch.library.custom_op("megatrain::add_rms_norm", mutates_args=())
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised total, the total, and every row's `r` for the backward pass."""
    require(x, residual, weight, row=x.shape[-1])
    assert x.shape == residual.shape and x.dtype == residual.dtype, (x.shape, residual.shape, x.dtype, residual.dtype)
    rows, others, weight, blocks = as_rows(x), as_rows(residual), weight.contiguous(), _blocks(x.shape[-1])
    normed = x.new_empty(x.shape, dtype=_normed_dtype(x, weight))
    total = x.new_empty(x.shape)
    scale = x.new_empty(x.shape[:-1], dtype=compute_dtype(x, weight))
    num_rows, width = rows.shape
    launch(
        _forward,
        (ceil_div(num_rows, blocks["ROWS"]),),
        *(rows, others, weight, normed, total, scale, rows.stride(0), others.stride(0), num_rows, width),
        EPS=eps,
        ADD=True,
        COMPUTE=compute_type(x, weight),
        **blocks,
    )
    return normed, total, scale


@_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    normed = x.new_empty(x.shape, dtype=_normed_dtype(x, weight))
    return normed, x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=compute_dtype(x, weight))


@torch.library.custom_op("megatrain::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    g: Tensor, g_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`d_x` and `d_weight`; `g_total` is added to `d_x` where there is one."""
    require(g, g_total, x, weight, row=x.shape[-1])
    rows, gradients, weight, blocks = as_rows(x), as_rows(g), weight.contiguous(), _blocks(x.shape[-1])
    others = gradients if g_total is None else as_rows(g_total)
    num_rows, width = rows.shape
    programs = min(num_programs(x), ceil_div(num_rows, blocks["ROWS"]))
    d_x = x.new_empty(x.shape)
    shares = scale.new_empty(programs, width)
    launch(
        _backward,
        (programs,),
        *(gradients, others, rows, weight, scale, d_x, shares),
        *(gradients.stride(0), others.stride(0), rows.stride(0), num_rows, width),
        ADD=g_total is not None,
        COMPUTE=compute_type(x, weight),
        **blocks,
    )
    return d_x, shares.sum(0).to(weight.dtype)


@_rms_norm_backward.register_fake
def _(g: Tensor, g_total: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # a missing gradient costs no pass over zeros
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

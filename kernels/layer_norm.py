"""LayerNorm, alone and after a residual addition: the plain references, and each in one fused pass over memory.

No module, no parameters: those belong to the model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, library
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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension (Ba et al., 2016, arXiv:1607.06450).

    `x` is `[..., D]`, `weight` and `bias` `[D]`; returns `[..., D]` in `x`'s dtype. `var` is the biased variance; mean
    and variance are accumulated in fp32 whatever `x`'s dtype.

    Gradients, with `r = 1/sqrt(var + eps)`, `n = (x - mean) * r`, `g` the gradient of the output and `h = g * weight`:
    `d_bias = sum(g)` and `d_weight = sum(g * n)` over all but the last dimension, and
    `d_x = r * (h - mean(h) - n * mean(h * n))`, the means over the last dimension.
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`(layer_norm(total), total)` with `total = x + residual`: what a block does to the residual stream.

    `x` and `residual` are `[..., D]` of one dtype, `weight` and `bias` `[D]`; both results are `[..., D]`.

    Gradients, with `d_norm` what `layer_norm` gives for its input and `g_total` the gradient of `total`:
    `d_x = d_residual = d_norm + g_total`; those of weight and bias are `layer_norm`'s.
    """
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def fused_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` in one pass forward and one backward. Sums in fp32 (fp64 for fp64).

    Raises `KernelError` where Triton cannot take these tensors (`support.unsupported(x, weight, bias, row=D)`).
    """
    normed, _, _ = _layer_norm(x, weight, bias, eps)
    return normed


def fused_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in one pass forward, and one backward for the gradients of both results together."""
    normed, total, _, _ = _add_layer_norm(x, residual, weight, bias, eps)
    return normed, total


@triton.jit
def _forward(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    normed: tl.tensor,
    total: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Normalises ROWS whole rows; `mean` and `scale` get each row's mean and r."""
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
    # The row is in registers, so the variance is that of the centred values: a large mean costs no precision.
    middle = tl.sum(values, axis=1) / width
    centred = tl.where(inside, values - middle[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + EPS)
    tl.store(mean + row, middle, mask=row < num_rows)
    tl.store(scale + row, r, mask=row < num_rows)
    w = tl.load(weight + columns, mask=columns < width, other=0.0).to(COMPUTE)
    y = centred * r[:, None] * w
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=columns < width, other=0.0).to(COMPUTE)
    tl.store(normed + rows * width + columns, rounded(y, normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    g: tl.tensor,
    g_total: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    mean: tl.tensor,
    scale: tl.tensor,
    d_x: tl.tensor,
    d_weight: tl.tensor,
    d_bias: tl.tensor,
    g_stride: tl.tensor,
    g_total_stride: tl.tensor,
    x_stride: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    ADD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """d_x of every num_programs-th group of ROWS rows, and those rows' share of d_weight and d_bias: one row of
    each."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + columns, mask=columns < width, other=0.0).to(COMPUTE)
    weight_share = tl.zeros([ROWS, BLOCK], dtype=COMPUTE)
    bias_share = tl.zeros([ROWS, BLOCK], dtype=COMPUTE)
    for first in range(program * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        rows = row[:, None]
        inside = (rows < num_rows) & (columns < width)
        middle = tl.load(mean + row, mask=row < num_rows, other=0.0).to(COMPUTE)[:, None]
        r = tl.load(scale + row, mask=row < num_rows, other=0.0).to(COMPUTE)[:, None]
        values = tl.load(x + rows * x_stride + columns, mask=inside, other=0.0).to(COMPUTE)
        n = tl.where(inside, (values - middle) * r, 0.0)
        gradient = tl.load(g + rows * g_stride + columns, mask=inside, other=0.0).to(COMPUTE)
        h = gradient * w
        d = r * (h - (tl.sum(h, axis=1) / width)[:, None] - n * (tl.sum(h * n, axis=1) / width)[:, None])
        if ADD:
            d += tl.load(g_total + rows * g_total_stride + columns, mask=inside, other=0.0).to(COMPUTE)
        tl.store(d_x + rows * width + columns, rounded(d, d_x.dtype.element_ty), mask=inside)
        weight_share += gradient * n
        if HAS_BIAS:
            bias_share += gradient
    tl.store(d_weight + program * width + columns, tl.sum(weight_share, axis=0)[None, :], mask=columns < width)
    if HAS_BIAS:
        tl.store(d_bias + program * width + columns, tl.sum(bias_share, axis=0)[None, :], mask=columns < width)


def _blocks(width: int) -> dict[str, int]:
    """Whole rows in a program; narrow ones several at a time."""
    block = next_power_of_2(width)
    rows = max(1, 2048 // block)
    return {"BLOCK": block, "ROWS": rows, "num_warps": num_warps(block * rows)}


def _run_forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> list[Tensor]:
    """The normalised rows, the total (an empty tensor without `residual`), every row's mean and `r`."""
    require(x, residual, weight, bias, row=x.shape[-1])
    rows, weight, blocks = as_rows(x), weight.contiguous(), _blocks(x.shape[-1])
    others = rows if residual is None else as_rows(residual)
    normed, total = x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
    mean, scale = (x.new_empty(x.shape[:-1], dtype=compute_dtype(x, weight)) for _ in range(2))
    num_rows, width = rows.shape
    launch(
        _forward,
        (ceil_div(num_rows, blocks["ROWS"]),),
        *(rows, others, weight, weight if bias is None else bias.contiguous(), normed, total, mean, scale),
        *(rows.stride(0), others.stride(0), num_rows, width),
        EPS=eps,
        ADD=residual is not None,
        HAS_BIAS=bias is not None,
        COMPUTE=compute_type(x, weight),
        **blocks,
    )
    return [normed, total, mean, scale]


@library.custom_op("megatrain::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised `x`, and every row's mean and `r` for the backward pass."""
    normed, _, mean, scale = _run_forward(x, None, weight, bias, eps)
    return normed, mean, scale


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, scale = (x.new_empty(x.shape[:-1], dtype=compute_dtype(x, weight)) for _ in range(2))
    return x.new_empty(x.shape), mean, scale


@library.custom_op("megatrain::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised total, the total, and every row's mean and `r` for the backward pass."""
    assert x.shape == residual.shape and x.dtype == residual.dtype, (x.shape, residual.shape, x.dtype, residual.dtype)
    normed, total, mean, scale = _run_forward(x, residual, weight, bias, eps)
    return normed, total, mean, scale


@_add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, scale = (x.new_empty(x.shape[:-1], dtype=compute_dtype(x, weight)) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, scale


@library.custom_op("megatrain::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    g: Tensor, g_total: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`d_x`, `d_weight` and `d_bias` (empty without one); `g_total` is added to `d_x` where there is one."""
    require(g, g_total, x, weight, row=x.shape[-1])
    rows, gradients, weight, blocks = as_rows(x), as_rows(g), weight.contiguous(), _blocks(x.shape[-1])
    others = gradients if g_total is None else as_rows(g_total)
    num_rows, width = rows.shape
    programs = min(num_programs(x), ceil_div(num_rows, blocks["ROWS"]))
    d_x = x.new_empty(x.shape)
    shares = scale.new_empty(2 if has_bias else 1, programs, width)
    launch(
        _backward,
        (programs,),
        *(gradients, others, rows, weight, mean, scale, d_x, shares[0], shares[-1]),
        *(gradients.stride(0), others.stride(0), rows.stride(0), num_rows, width),
        ADD=g_total is not None,
        HAS_BIAS=has_bias,
        COMPUTE=compute_type(x, weight),
        **blocks,
    )
    sums = shares.sum(1).to(weight.dtype)
    return d_x, sums[0].clone(), sums[1].clone() if has_bias else weight.new_empty(0)


@_layer_norm_backward.register_fake
def _(
    g: Tensor, g_total: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape if has_bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # a missing gradient costs no pass over zeros
    source = inputs[0] if len(inputs) == 4 else output[1]
    ctx.save_for_backward(source, inputs[-3], *output[-2:])
    ctx.has_bias = inputs[-2] is not None


def _layer_norm_gradient(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return None, None, None, None
    d_x, d_weight, d_bias = _layer_norm_backward(g, None, *ctx.saved_tensors, ctx.has_bias)
    return d_x, d_weight, d_bias if ctx.has_bias else None, None


def _add_layer_norm_gradient(
    ctx: Any, g: Tensor | None, g_total: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if g is None:
        return g_total, g_total, None, None, None
    d_total, d_weight, d_bias = _layer_norm_backward(g, g_total, *ctx.saved_tensors, ctx.has_bias)
    return d_total, d_total, d_weight, d_bias if ctx.has_bias else None, None


_layer_norm.register_autograd(_layer_norm_gradient, setup_context=_save)
_add_layer_norm.register_autograd(_add_layer_norm_gradient, setup_context=_save)

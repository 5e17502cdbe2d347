"""LayerNorm, alone and after a residual addition: the plain references, and the versions fused into one pass.

The modules and their parameters are in megatrain/model/gpt.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, library
from torch.nn import functional as F

from megatrain.kernels.norms import empty_statistic, launch_backward, launch_forward, partial_gradients
from megatrain.kernels.support import jit, rounded, tl


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return `(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension.

    `x` is `[..., D]`, `weight` and `bias` `[D]`; returns `[..., D]` in `x`'s dtype. `var` is the biased variance. Mean
    and variance are accumulated in fp32, whatever the dtype of `x` (Ba et al., 2016, arXiv:1607.06450).

    Gradients, with `r = 1/sqrt(var + eps)`, `n = (x - mean) * r`, `g` the gradient of the output and `h = g * weight`:
    `d_bias = sum(g)` and `d_weight = sum(g * n)` over all but the last dimension, and
    `d_x = r * (h - mean(h) - n * mean(h * n))`, the means over the last dimension.
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `(layer_norm(total), total)` with `total = x + residual`, the residual stream's update in a block.

    `x` and `residual` are `[..., D]` of one dtype, `weight` and `bias` `[D]`; both results are `[..., D]`.

    Gradients, with `d_norm` the gradient of `layer_norm`'s input and `g_total` the gradient of `total`:
    `d_x = d_residual = d_norm + g_total`; those of weight and bias are as for `layer_norm`.
    """
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def fused_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Compute `layer_norm` in one pass forward and one backward. Sums are fp32 (fp64 for fp64 inputs).

    Raises:
        KernelError: Triton cannot take these tensors (`support.unsupported(x, weight, bias, row=D)`).
    """
    normed: Tensor = _layer_norm(x, weight, bias, eps)[0]
    return normed


def fused_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `add_layer_norm` in one pass forward and one backward, which handles the gradients of both results."""
    normed, total, _, _ = _add_layer_norm(x, residual, weight, bias, eps)
    return normed, total


@jit
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
    """Normalise ROWS whole rows; store each row's mean in `mean` and its r in `scale`."""
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
    # The row is in registers, so the variance comes from the centred values: a large mean costs no precision.
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


@jit
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
    """Compute d_x of every num_programs-th group of ROWS rows, and those rows' part of d_weight and d_bias.

    Each program writes one row of `d_weight` and `d_bias`.
    """
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


def _run_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normalised rows, the total (meaningless without `residual`), and each row's mean and `r`."""
    normed, weight = x.new_empty(x.shape), weight.contiguous()
    mean, scale = empty_statistic(x, weight), empty_statistic(x, weight)
    parameters = (weight, weight if bias is None else bias.contiguous())
    total = launch_forward(_forward, x, residual, parameters, normed, (mean, scale), eps, HAS_BIAS=bias is not None)
    return normed, total, mean, scale


@library.custom_op("megatrain::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised `x`, and each row's mean and `r` for the backward pass."""
    normed, _, mean, scale = _run_forward(x, None, weight, bias, eps)
    return normed, mean, scale


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), empty_statistic(x, weight), empty_statistic(x, weight)


@library.custom_op("megatrain::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normalised total, the total, and each row's mean and `r` for the backward pass."""
    return _run_forward(x, residual, weight, bias, eps)


@_add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), empty_statistic(x, weight), empty_statistic(x, weight)


@library.custom_op("megatrain::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    g: Tensor, g_total: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `d_x`, which includes `g_total` if given, `d_weight`, and `d_bias` (empty without a bias)."""
    partials = partial_gradients(x, scale, 2 if has_bias else 1)
    ends = (partials[0], partials[-1])  # without a bias the kernel does not touch the second
    d_x = launch_backward(_backward, g, g_total, x, weight, (mean, scale), ends, HAS_BIAS=has_bias)
    sums = partials.sum(1).to(weight.dtype)
    return d_x, sums[0].clone(), sums[1].clone() if has_bias else weight.new_empty(0)


@_layer_norm_backward.register_fake
def _(
    g: Tensor, g_total: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape if has_bias else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # a missing gradient stays None, which saves a pass over zeros
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

"""GELU in GPT-2's tanh approximation: the plain reference and the fused version."""

from __future__ import annotations

from typing import Any

from torch import Tensor, library
from torch.nn import functional as F

from megatrain.kernels.support import (
    as_rows,
    ceil_div,
    compute_type,
    jit,
    launch,
    next_power_of_2,
    num_warps,
    require,
    rounded,
    tl,
)


def gelu(x: Tensor) -> Tensor:
    """Return `0.5 x (1 + tanh(u))` with `u = sqrt(2/pi) (x + 0.044715 x^3)`, elementwise.

    `x` has any shape, and the result has its shape and dtype (Hendrycks and Gimpel, 2016, arXiv:1606.08415).

    Gradient, with `t = tanh(u)`: `d_x = g * (0.5 (1 + t) + 0.5 x (1 - t^2) sqrt(2/pi) (1 + 3 * 0.044715 x^2))`.
    """
    return F.gelu(x, approximate="tanh")


def fused_gelu(x: Tensor) -> Tensor:
    """Compute `gelu` in one pass, in fp32 (fp64 for fp64 input). Only the input is saved for backward.

    With `s = sigmoid(2u)`, `0.5 (1 + tanh(u)) = s` and `1 - tanh(u)^2 = 4 s (1 - s)`, so `y = x s` and
    `d_x = g * (s + x s (1 - s) 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2))`.

    Raises:
        KernelError: Triton cannot take this tensor (`support.unsupported(x)`).
    """
    result: Tensor = _gelu(x)
    return result


@jit
def _gelu_kernel(
    x: tl.tensor,
    g: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    g_stride: tl.tensor,
    width: tl.tensor,
    BACKWARD: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute gelu(x), or with BACKWARD its gradient, for one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside).to(COMPUTE)
    square = values * values
    twice_u = 1.5957691216057308 * values * (1.0 + 0.044715 * square)  # 2 sqrt(2/pi)
    # The exponent is at most 0, so exp and s (1 - s) cannot overflow, and 1 - s stays accurate where s is near 1.
    e = tl.exp(-tl.abs(twice_u))
    s = tl.where(twice_u < 0, e, 1.0) / (1.0 + e)
    if BACKWARD:
        gradient = tl.load(g + row * g_stride + columns, mask=inside).to(COMPUTE)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * square)
        y = gradient * (s + values * slope * (e / ((1.0 + e) * (1.0 + e))))
    else:
        y = values * s
    tl.store(out + row * width + columns, rounded(y, out.dtype.element_ty), mask=inside)


def _run(x: Tensor, g: Tensor | None) -> Tensor:
    require(x, g)
    rows, out = as_rows(x), x.new_empty(x.shape)
    gradients = rows if g is None else as_rows(g)
    num_rows, width = rows.shape
    block = min(next_power_of_2(width), 2048)
    launch(
        _gelu_kernel,
        (num_rows, ceil_div(width, block)),
        *(rows, gradients, out, rows.stride(0), gradients.stride(0), width),
        BACKWARD=g is not None,
        COMPUTE=compute_type(x),
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return out


@library.custom_op("megatrain::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    return _run(x, None)


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@library.custom_op("megatrain::gelu_backward", mutates_args=())
def _gelu_backward(g: Tensor, x: Tensor) -> Tensor:
    return _run(x, g)


@_gelu_backward.register_fake
def _(g: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, g: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    d_x: Tensor = _gelu_backward(g, x)
    return d_x


_gelu.register_autograd(_gradient, setup_context=_save)

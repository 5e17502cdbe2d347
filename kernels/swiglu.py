"""SwiGLU, the gate between the feed-forward layer's projections: the plain reference and the fused version."""

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


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, elementwise (Shazeer, 2020, arXiv:2002.05202).

    `gate`, `up` and the result have the same shape and dtype.

    Gradients, with `s = sigmoid(gate)` and `g` the gradient of the output: `d_up = g * gate * s` and
    `d_gate = g * up * s * (1 + gate * (1 - s))`.
    """
    return F.silu(gate) * up


def fused_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `swiglu` in one pass, in fp32 (fp64 for fp64 inputs), and round once. Only the inputs are saved.

    Raises:
        KernelError: Triton cannot take these tensors (`support.unsupported(gate, up)`).
    """
    result: Tensor = _swiglu(gate, up)
    return result


@jit
def _forward(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    width: tl.tensor,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute `swiglu` for one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    a = tl.load(gate + row * gate_stride + columns, mask=inside).to(COMPUTE)
    b = tl.load(up + row * up_stride + columns, mask=inside).to(COMPUTE)
    tl.store(out + row * width + columns, rounded(a / (1.0 + tl.exp(-a)) * b, out.dtype.element_ty), mask=inside)


@jit
def _backward(
    g: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    g_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    width: tl.tensor,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute both gradients for one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gradient = tl.load(g + row * g_stride + columns, mask=inside).to(COMPUTE)
    a = tl.load(gate + row * gate_stride + columns, mask=inside).to(COMPUTE)
    b = tl.load(up + row * up_stride + columns, mask=inside).to(COMPUTE)
    s = 1.0 / (1.0 + tl.exp(-a))
    by_gate = gradient * b * s * (1.0 + a * (1.0 - s))
    tl.store(d_gate + row * width + columns, rounded(by_gate, d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + row * width + columns, rounded(gradient * a * s, d_up.dtype.element_ty), mask=inside)


def _blocks(width: int) -> dict[str, int]:
    block = min(next_power_of_2(width), 2048)
    return {"BLOCK": block, "num_warps": num_warps(block)}


@library.custom_op("megatrain::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    require(gate, up)
    assert gate.shape == up.shape and gate.dtype == up.dtype, (gate.shape, up.shape, gate.dtype, up.dtype)
    a, b, out = as_rows(gate), as_rows(up), gate.new_empty(gate.shape)
    (num_rows, width), blocks = a.shape, _blocks(gate.shape[-1])
    grid = (num_rows, ceil_div(width, blocks["BLOCK"]))
    launch(_forward, grid, a, b, out, a.stride(0), b.stride(0), width, COMPUTE=compute_type(gate), **blocks)
    return out


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@library.custom_op("megatrain::swiglu_backward", mutates_args=())
def _swiglu_backward(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    require(g, gate, up)
    gradients, a, b = as_rows(g), as_rows(gate), as_rows(up)
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    (num_rows, width), blocks = a.shape, _blocks(gate.shape[-1])
    launch(
        _backward,
        (num_rows, ceil_div(width, blocks["BLOCK"])),
        *(gradients, a, b, d_gate, d_up, gradients.stride(0), a.stride(0), b.stride(0), width),
        COMPUTE=compute_type(gate),
        **blocks,
    )
    return d_gate, d_up


@_swiglu_backward.register_fake
def _(g: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = _swiglu_backward(g, *ctx.saved_tensors)
    return d_gate, d_up


_swiglu.register_autograd(_gradient, setup_context=_save)

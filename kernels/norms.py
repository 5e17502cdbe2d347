"""What the fused norms share: launching their kernels over rows. The mathematics is in layer_norm.py and rms_norm.py.

A norm's forward kernel takes x, residual, parameters, normed, total, statistics; its backward kernel g, g_total, x,
weight, statistics, d_x and the partial gradients of the parameters. Both then take the strides, the number of rows and
the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

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
)


def norm_blocks(width: int) -> dict[str, int]:
    """Return the block sizes of a norm's kernel. A program holds whole rows, several at a time if they are narrow."""
    block = next_power_of_2(width)
    rows = max(1, 2048 // block)
    return {"BLOCK": block, "ROWS": rows, "num_warps": num_warps(block * rows)}


def empty_statistic(x: Tensor, weight: Tensor) -> Tensor:
    """Return uninitialised memory for one number per row of `x`, in the dtype that the kernels compute in."""
    return x.new_empty(x.shape[:-1], dtype=compute_dtype(x, weight))


def launch_forward(
    kernel: Any,
    x: Tensor,
    residual: Tensor | None,
    parameters: Sequence[Tensor],
    normed: Tensor,
    statistics: Sequence[Tensor],
    eps: float,
    **constants: Any,
) -> Tensor:
    """Fill `normed` and `statistics` from `x`, or from `x + residual`; return that sum, or `normed` if there is none.

    `parameters` are contiguous `[D]`, the weight first.
    """
    require(x, residual, *parameters, row=x.shape[-1])
    rows, blocks = as_rows(x), norm_blocks(x.shape[-1])
    others, total = rows, normed
    if residual is not None:
        assert x.shape == residual.shape and x.dtype == residual.dtype, (x.shape, residual.shape, x.dtype)
        others, total = as_rows(residual), x.new_empty(x.shape)
    num_rows, width = rows.shape
    launch(
        kernel,
        (ceil_div(num_rows, blocks["ROWS"]),),
        *(rows, others, *parameters, normed, total, *statistics),
        *(rows.stride(0), others.stride(0), num_rows, width),
        EPS=eps,
        ADD=residual is not None,
        COMPUTE=compute_type(x, parameters[0]),
        **constants,
        **blocks,
    )
    return total


def partial_gradients(x: Tensor, statistic: Tensor, num_parameters: int) -> Tensor:
    """Return uninitialised memory for each program's partial gradients, `[num_parameters, programs, D]`."""
    num_groups = ceil_div(x.shape[:-1].numel(), norm_blocks(x.shape[-1])["ROWS"])
    return statistic.new_empty(num_parameters, min(num_programs(x), num_groups), x.shape[-1])


def launch_backward(
    kernel: Any,
    g: Tensor,
    g_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    statistics: Sequence[Tensor],
    partials: Sequence[Tensor],
    **constants: Any,
) -> Tensor:
    """Fill `partials`, each `[programs, D]`, and return `d_x`, which includes `g_total` if given."""
    require(g, g_total, x, weight, row=x.shape[-1])
    rows, gradients = as_rows(x), as_rows(g)
    others = gradients if g_total is None else as_rows(g_total)
    d_x = x.new_empty(x.shape)
    launch(
        kernel,
        (len(partials[0]),),
        *(gradients, others, rows, weight.contiguous(), *statistics, d_x, *partials),
        *(gradients.stride(0), others.stride(0), rows.stride(0), *rows.shape),
        ADD=g_total is not None,
        COMPUTE=compute_type(x, weight),
        **constants,
        **norm_blocks(x.shape[-1]),
    )
    return d_x

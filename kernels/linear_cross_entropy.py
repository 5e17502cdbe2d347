"""The head's projection and cross-entropy: the plain reference, and a chunked version that never holds all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatrain.kernels import CHUNK_BYTES, CUDA_CHUNK_BYTES
from megatrain.kernels.cross_entropy import (
    cross_entropy_sum,
    cross_entropy_with_gradient_,
    fused_cross_entropy_with_gradient_,
)
from megatrain.kernels.linear import add_product_, product


def linear_cross_entropy_sum(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return `cross_entropy_sum(x weight^T, labels, weights)`, an fp32 scalar in nats.

    `x` is `[..., D]`, `weight` `[V, D]` of the same dtype, `labels` integers `[...]`, `weights` float `[...]` or None.

    Gradients, with `d` `[N, V]` the gradient of `cross_entropy_sum`'s logits: `d_x = d weight`, `d_weight = d^T x`.
    """
    return cross_entropy_sum(F.linear(x, weight), labels, weights)


def chunked_linear_cross_entropy_sum(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    chunk_bytes: int | None = None,
    fused: bool = False,
) -> Tensor:
    """Compute `linear_cross_entropy_sum` over chunks of rows, loss and gradients together. Any device, any dtype.

    The gradient overwrites a chunk's logits and is multiplied into `d_x` and `d_weight` at once; backward only scales
    these two. Memory: one chunk of logits of `chunk_bytes` (default by device; at least one row) and the two gradients.
    The reference keeps `[N, V]` several times. linear.py computes the same three matrix products. On a GPU with an
    unaligned vocabulary (50,257, for example), rows of logits are padded to a multiple of 128 bytes, because unaligned
    products take several times as long. In 16 bits, `d_weight` is summed over chunks in fp32 and then rounded. The loss
    of a chunk takes a few passes over rows that stay in the cache, or with `fused` one Triton kernel.

    There is no second derivative, and backward runs only once, because it scales the gradient of `weight` in place.
    """
    needs = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if x.is_cuda else CHUNK_BYTES
    loss: Tensor = _chunked(
        x.flatten(0, -2),
        weight,
        labels.flatten(),
        None if weights is None else weights.flatten(),
        chunk_bytes,
        fused,
        needs,
    )[0]
    return loss


@torch.library.custom_op("megatrain::linear_cross_entropy", mutates_args=())
def _chunked(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    chunk_bytes: int,
    fused: bool,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and the gradients of `x` and `weight`; without `with_gradients` these two are empty."""
    num_rows, vocab = len(x), len(weight)
    padding = padding_rows(weight)
    table = F.pad(weight, (0, 0, 0, padding)) if padding else weight  # F.pad copies even without padding
    rows = max(1, min(num_rows, chunk_bytes // (max(1, len(table)) * x.element_size())))
    in_place = fused_cross_entropy_with_gradient_ if fused else cross_entropy_with_gradient_
    loss = torch.zeros((), dtype=torch.float32, device=x.device)
    d_x = torch.empty_like(x) if with_gradients else x.new_empty(0)
    d_table = weight.new_empty(0)
    if with_gradients and num_rows == 0:
        d_table = torch.zeros_like(weight, dtype=_accumulated(weight))
    for start in range(0, num_rows, rows):
        part = slice(start, min(start + rows, num_rows))
        chunk = product(x[part], table.t())  # in the padded columns the logits and gradients are 0
        loss += in_place(chunk[:, :vocab], labels[part], None if weights is None else weights[part]).sum()
        if with_gradients:
            product(chunk, table, out=d_x[part])
            d_table = add_chunk_product(None if start == 0 else d_table, chunk.t(), x[part])
        del chunk  # free it before the next chunk is allocated
    return loss, d_x, d_table[:vocab]


def padding_rows(weight: Tensor) -> int:
    """Return how many rows of zeros to append to a weight on a GPU, so that rows of logits are aligned to 16 bytes.

    On an H200, products over 50,257 columns in bf16 took 7 times as long as over 50,304 (docs/measurements/kernels.md).
    """
    if not weight.is_cuda or len(weight) * weight.element_size() % 16 == 0:
        return 0
    return -len(weight) % (128 // weight.element_size())


def _accumulated(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which the weight's gradient is summed over chunks."""
    return torch.promote_types(tensor.dtype, torch.float32)


def add_chunk_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return `total + a b`, computed in place if there is a total, in the dtype that `_accumulated` returns.

    If each chunk were rounded to 16 bits, the sum would lose half a bit.
    """
    if a.is_cuda and a.dtype != _accumulated(a):
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    if total is None:
        return add_product_(a.new_empty(len(a), b.shape[1], dtype=_accumulated(a)), a, b, accumulate=False)
    return add_product_(total, a, b)


@_chunked.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    chunk_bytes: int,
    fused: bool,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    if with_gradients:
        return loss, torch.empty_like(x), torch.empty_like(weight, dtype=_accumulated(weight))
    return loss, x.new_empty(0), weight.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    d_x, d_weight = ctx.saved_tensors
    d_x = d_x * g if ctx.needs_input_grad[0] else None
    d_weight = d_weight.mul_(g).to(ctx.dtype) if ctx.needs_input_grad[1] else None
    return d_x, d_weight, None, None, None, None, None


_chunked.register_autograd(_backward, setup_context=_setup_context)

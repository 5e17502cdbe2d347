"""The log-probability of each label: the plain reference, and the head's projection in chunks of rows.

Cross-entropy sums its losses, so its gradient is known in the forward pass (linear_cross_entropy.py). Here each token
has a gradient of its own, known only in the backward pass: the chunks keep two numbers a token and compute the logits
again. The mathematics is in cross_entropy.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatrain.kernels import CHUNK_BYTES, CUDA_CHUNK_BYTES, IGNORE_INDEX
from megatrain.kernels.linear import product
from megatrain.kernels.linear_cross_entropy import add_chunk_product, padding_rows
from megatrain.kernels.vocabulary_cross_entropy import (
    fused_vocabulary_gradient_,
    fused_vocabulary_statistics,
    vocabulary_gradient_,
    vocabulary_statistics,
)


def label_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return `log softmax(logits)[label]` in nats, fp32 `[...]`, for `logits` `[..., V]` and integers `labels` `[...]`.

    Where a label is `IGNORE_INDEX`, the result and its gradient are 0.

    Gradient, with `g` `[...]` that of the result and `p = softmax(logits)`: `d_logits = g * (onehot(label) - p)`.
    """
    losses = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -losses.view(labels.shape)


def linear_log_probs(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return `label_log_probs(x weight^T, labels)`, fp32 `[...]`; `x` is `[..., D]`, `weight` `[V, D]`."""
    return label_log_probs(F.linear(x, weight), labels)


def chunked_linear_log_probs(
    x: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int | None = None, fused: bool = False
) -> Tensor:
    """Compute `linear_log_probs` over chunks of rows. Any device, any dtype.

    Memory: one chunk of logits of `chunk_bytes` (default by device; at least one row), and in the backward pass the two
    gradients. Between the passes two fp32 numbers a token are kept, and the backward pass computes the logits again:
    four matrix products. The reference has three and keeps `[N, V]`. With `fused` statistics and gradient are one
    Triton kernel each.
    """
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if x.is_cuda else CHUNK_BYTES
    apply: Callable[..., Tensor] = _LogProbs.apply
    return apply(x.flatten(0, -2), weight, labels.flatten(), chunk_bytes, fused).view(labels.shape)


class _LogProbs(torch.autograd.Function):
    """The log-probabilities of `chunked_linear_log_probs` and their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int, fused: bool) -> Tensor:
        """Return fp32 `[N]` for `x` `[N, D]`, `weight` `[V, D]` and `labels` `[N]`."""
        statistics = fused_vocabulary_statistics if fused else vocabulary_statistics
        table = _table(weight)
        ctx.rows, ctx.fused = max(1, chunk_bytes // (max(1, len(table)) * x.element_size())), fused
        log_probs, logsumexp = torch.empty((2, len(x)), dtype=torch.float32, device=x.device)
        for part in _parts(len(x), ctx.rows):
            logits = product(x[part], table.t())[:, : len(weight)]
            largest, sums, label_logits = statistics(logits, labels[part], 0)
            log_sum = sums.log()
            # Subtract in this order: `largest` may be far larger than the result.
            log_probs[part] = (label_logits - largest) - log_sum
            logsumexp[part] = largest + log_sum
            del logits  # free it before the next chunk is allocated
        ctx.save_for_backward(x, weight, labels, logsumexp)
        result: Tensor = log_probs.where(labels != IGNORE_INDEX, 0.0)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of `x` and `weight` for that of the log-probabilities, `[N]`."""
        x, weight, labels, logsumexp = ctx.saved_tensors
        gradient_ = fused_vocabulary_gradient_ if ctx.fused else vocabulary_gradient_
        table, factors = _table(weight), -gradients[0].float()
        d_x = torch.empty_like(x)
        d_table: Tensor | None = None if len(x) else torch.zeros_like(table)
        for part in _parts(len(x), ctx.rows):
            logits = product(x[part], table.t())  # in the padded columns the logits and gradients are 0
            gradient_(logits[:, : len(weight)], labels[part], 0, logsumexp[part], factors[part].contiguous())
            product(logits, table, out=d_x[part])
            d_table = add_chunk_product(d_table, logits.t(), x[part])
            del logits
        assert d_table is not None
        return d_x, d_table[: len(weight)].to(weight.dtype), None, None, None


def _table(weight: Tensor) -> Tensor:
    """Return the weight, padded with rows of zeros where products are faster so."""
    padding = padding_rows(weight)
    return F.pad(weight, (0, 0, 0, padding)) if padding else weight


def _parts(num_rows: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]

"""Cross-entropy with the vocabulary sharded over ranks: each rank's statistics, and its part of the gradient.

Nothing here communicates: megatrain/parallel/vocabulary.py merges the ranks' statistics (Shoeybi et al., 2019,
arXiv:1909.08053, section 3). The mathematics is in cross_entropy.py; a rank holds one part of each row.

Shapes: N tokens, V columns of the vocabulary on this rank, starting with token id `first`. `lse` is the logarithm
of the sum of exponentials over the whole vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.cross_entropy import (
    check_rows,
    label_factor,
    label_weights,
    row_blocks,
    row_chunks,
    row_gradient_,
    row_statistics,
)
from megatrain.kernels.support import as_rows, compute_dtype, compute_type, jit, launch, require, tl


@torch.no_grad()
def vocabulary_statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's statistics of each row of its `logits` `[N, V]`: three tensors, fp32 `[N]`.

    They are the largest logit; the sum of `exp(logit - largest)`; and the label's logit, 0 if it is on another rank.
    `labels` are integers `[N]` in the whole vocabulary. If all logits are -inf, or V is 0, the largest is -inf and
    the sum 0. With `m` the largest over all ranks, `lse = m + log(sum over ranks of sum * exp(largest - m))`.
    """
    largest = torch.full(labels.shape, -torch.inf, device=logits.device)
    sums, label_logits = torch.zeros_like(largest), torch.zeros_like(largest)
    if logits.shape[-1] == 0:
        return largest, sums, label_logits
    columns, is_local = _local_columns(labels, first, logits.shape[-1])
    for rows in row_chunks(logits):
        scores = logits[rows].float()
        torch.amax(scores, dim=-1, out=largest[rows])
        origin = largest[rows].masked_fill(largest[rows] == -torch.inf, 0.0)
        sums[rows] = (scores - origin[:, None]).exp_().sum(dim=-1)
        label_logits[rows] = scores.gather(-1, columns[rows, None])[:, 0].where(is_local[rows], 0.0)
    return largest, sums, label_logits


@torch.no_grad()
def vocabulary_gradient_(
    logits: Tensor, labels: Tensor, first: int, logsumexp: Tensor, weights: Tensor | None = None
) -> None:
    """OVERWRITE this rank's `logits` `[N, V]` with the gradient of the sum of weighted losses, in their dtype.

    `logsumexp` (fp32 `[N]`) is `lse`; `labels` and `first` as in `vocabulary_statistics`; `weights` float `[N]` or None
    for 1 each. If the gradient of the sum is not 1, multiply it into the weights.
    """
    if logits.shape[-1] == 0:
        return
    factors, _ = label_weights(labels, weights)
    columns, is_local = _local_columns(labels, first, logits.shape[-1])
    at_label = -factors.where(is_local, 0.0)
    for rows in row_chunks(logits):
        scores = logits[rows].float()  # fp32 logits are not copied, so all of this is in place
        scores.sub_(logsumexp[rows, None]).exp_().mul_(factors[rows, None]).scatter_add_(
            1, columns[rows, None], at_label[rows, None]
        )
        if logits.dtype != torch.float32:
            logits[rows] = scores


def _local_columns(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Return each label's column on this rank (0 if it is on another), and a bool mask of the labels on this rank."""
    columns = labels - first
    is_local = (columns >= 0) & (columns < width)
    return columns.where(is_local, 0), is_local


def fused_vocabulary_statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `vocabulary_statistics` in one read of the logits, by online softmax.

    Raises:
        KernelError: Triton cannot take these tensors (`support.unsupported(logits, labels)`).
    """
    largest, sums, label_logits = _vocabulary_statistics(logits, labels, first)
    return largest, sums, label_logits


def fused_vocabulary_gradient_(
    logits: Tensor, labels: Tensor, first: int, logsumexp: Tensor, weights: Tensor | None = None
) -> None:
    """Compute `vocabulary_gradient_` in one read and one write of the logits, whose rows must be contiguous.

    Raises:
        KernelError: Triton cannot take these tensors (`support.unsupported(logits, labels, logsumexp, weights)`).
    """
    _vocabulary_gradient_(logits, labels, first, logsumexp, weights)


@jit
def _statistics_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    largest: tl.tensor,
    sums: tl.tensor,
    label_logits: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute one row of `vocabulary_statistics`."""
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * stride
    local = tl.load(labels + row).to(tl.int64) - first
    label_logit = tl.load(row_start + local, mask=(local >= 0) & (local < width), other=0.0).to(COMPUTE)
    highest, total = row_statistics(row_start, width, COMPUTE, BLOCK)
    tl.store(largest + row, highest)
    tl.store(sums + row, total)
    tl.store(label_logits + row, label_logit)


@jit
def _gradient_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    weights: tl.tensor,
    logsumexp: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    HAS_WEIGHTS: tl.constexpr,
    IGNORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute one row of `vocabulary_gradient_`."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    factor = label_factor(label, weights, row, HAS_WEIGHTS, IGNORE, COMPUTE)
    lse = tl.load(logsumexp + row).to(COMPUTE)
    row_gradient_(logits + row * stride, lse, factor, factor, label - first, width, COMPUTE, BLOCK)


def _empty_row_stats(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialised memory for the three statistics of each row."""
    largest, sums, label_logits = (logits.new_empty(len(logits), dtype=compute_dtype(logits)) for _ in range(3))
    return largest, sums, label_logits


@library.custom_op("megatrain::vocabulary_statistics", mutates_args=())
def _vocabulary_statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    require(logits, labels)
    logits = as_rows(logits)
    stats = _empty_row_stats(logits)
    launch(
        _statistics_kernel,
        (len(logits),),
        *(logits, labels.contiguous(), *stats, logits.stride(0), logits.shape[1], first),
        COMPUTE=compute_type(logits),
        **row_blocks(logits.shape[1]),
    )
    return stats


@_vocabulary_statistics.register_fake
def _(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_row_stats(logits)


@library.custom_op("megatrain::vocabulary_gradient_", mutates_args=("logits",))
def _vocabulary_gradient_(
    logits: Tensor, labels: Tensor, first: int, logsumexp: Tensor, weights: Tensor | None
) -> None:
    require(logits, labels, logsumexp, weights)
    check_rows(logits)
    launch(
        _gradient_kernel,
        (len(logits),),
        *(logits, labels.contiguous(), labels if weights is None else weights.contiguous(), logsumexp.contiguous()),
        *(logits.stride(0), logits.shape[1], first),
        HAS_WEIGHTS=weights is not None,
        IGNORE=IGNORE_INDEX,
        COMPUTE=compute_type(logits),
        **row_blocks(logits.shape[1]),
    )


@_vocabulary_gradient_.register_fake
def _(logits: Tensor, labels: Tensor, first: int, logsumexp: Tensor, weights: Tensor | None) -> None:
    return None

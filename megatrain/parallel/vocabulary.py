"""Losses over a vocabulary that is cut over a tensor group, without gathering any logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.choice import Kernels
from megatrain.kernels.cross_entropy import label_weights
from megatrain.kernels.distillation import Merge, Sums, Teaching, distillation_of_logits


def vocabulary_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None, first: int, group: dist.ProcessGroup, kernels: Kernels
) -> Tensor:
    """Return `cross_entropy_sum` where `logits` `[..., V_local]` are this rank's columns, from token id `first` on.

    `labels` (ids of the whole vocabulary) and `weights` are `[...]`. They are equal on all ranks of the group, as is
    the result. Three numbers per token are all-reduced: the largest logit, the sum of exponentials and the label's
    logit (Shoeybi et al., 2019, arXiv:1909.08053, section 3). No second tensor of the logits' size is kept. The
    backward pass OVERWRITES the logits with their gradient, so it can run only once.
    """
    losses = _losses(logits, labels, first, group, kernels)
    return losses.sum() if weights is None else (losses * weights.float()).sum()


def vocabulary_parallel_label_gap(
    logits: Tensor, labels: Tensor, weights: Tensor | None, first: int, vocab: int, group: dist.ProcessGroup
) -> Tensor:
    """Return `label_gap_sum` where `logits` `[..., V_local]` are this rank's columns of `vocab`, from `first` on.

    The result is equal on all ranks of the group; its gradient is that of this rank's columns.
    """
    factors, _ = label_weights(labels.flatten(), None if weights is None else weights.flatten())
    rows, columns = logits.flatten(0, -2), labels.flatten() - first
    is_local = (columns >= 0) & (columns < rows.shape[-1])
    own = -rows.float().sum(-1) / vocab
    if rows.shape[-1]:
        own = own + rows.gather(-1, columns.where(is_local, 0)[:, None])[:, 0].float().where(is_local, 0.0)
    part = (own * factors).sum()
    total = part.detach().clone()
    dist.all_reduce(total, group=group)
    return part + (total - part.detach())


def vocabulary_parallel_log_probs(
    logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup, kernels: Kernels
) -> Tensor:
    """Return `label_log_probs`, fp32 `[...]`, with the arguments and memory of `vocabulary_parallel_cross_entropy`."""
    return -_losses(logits, labels, first, group, kernels)


def vocabulary_parallel_distillation(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    teaching: Teaching,
    first: int,
    vocab: int,
    group: dist.ProcessGroup,
) -> Sums:
    """Return `distillation_of_logits` where `logits` `[..., V_local]` are this rank's columns of `vocab`, from `first`.

    `teaching` is of the whole vocabulary, and equal on all ranks of the group, as are the sums. Seven numbers a token
    are all-reduced.
    """

    def reduce(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        dist.all_reduce(values, operation, group)
        return values

    merge = Merge(lambda values: reduce(values, dist.ReduceOp.MAX), lambda values: reduce(values, dist.ReduceOp.SUM))
    own = replace(teaching, weight=teaching.weight[first : first + logits.shape[-1]])
    return distillation_of_logits(logits, labels, weights, own, first, vocab, merge)


def _losses(logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup, kernels: Kernels) -> Tensor:
    apply: Callable[..., Tensor] = _CrossEntropy.apply
    return apply(logits, labels, first, group, kernels)


class _CrossEntropy(torch.autograd.Function):
    """Each token's loss, 0 for ignored labels, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup, kernels: Kernels
    ) -> Tensor:
        """Return the losses in nats, fp32 `[...]`, of `logits` `[..., V]` and `labels` `[...]`."""
        scores, targets = logits.flatten(0, -2), labels.flatten()
        own_largest, sums, label_logits = kernels.vocabulary_statistics(scores, targets, first)
        largest = own_largest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        both = torch.stack([sums * (own_largest - largest).exp(), label_logits])
        dist.all_reduce(both, group=group)
        log_sum = both[0].log()
        # Subtract in this order: `largest` may be far larger than the loss.
        losses = (log_sum - (both[1] - largest)).where(targets != IGNORE_INDEX, 0.0)
        ctx.save_for_backward(scores, targets, largest + log_sum)
        ctx.first, ctx.shape, ctx.kernels, ctx.is_spent = first, logits.shape, kernels, False
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of the logits `[..., V]` for that of the losses `[...]`, in the logits' own memory."""
        assert not ctx.is_spent, "the logits of this loss were overwritten with their gradient"
        ctx.is_spent = True
        scores, targets, logsumexp = ctx.saved_tensors
        factors = gradients[0].flatten().contiguous()
        ctx.kernels.vocabulary_gradient_(scores, targets, ctx.first, logsumexp, factors)
        return scores.view(ctx.shape), None, None, None, None

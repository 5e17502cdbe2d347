"""Cross-entropy over a vocabulary that is cut over a tensor group, without gathering any logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.choice import Kernels


def vocabulary_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None, first: int, group: dist.ProcessGroup, kernels: Kernels
) -> Tensor:
    """Return `cross_entropy_sum` where `logits` `[..., V_local]` are this rank's columns, from token id `first` on.

    `labels` (ids of the whole vocabulary) and `weights` are `[...]`. They are equal on all ranks of the group, as is
    the result. Three numbers per token are all-reduced: the largest logit, the sum of exponentials and the label's
    logit (Shoeybi et al., 2019, arXiv:1909.08053, section 3). No second tensor of the logits' size is kept. The
    backward pass OVERWRITES the logits with their gradient, so it can run only once.
    """
    apply: Callable[..., Tensor] = _CrossEntropy.apply
    return apply(logits, labels, weights, first, group, kernels)


class _CrossEntropy(torch.autograd.Function):
    """The loss of `vocabulary_parallel_cross_entropy` and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        first: int,
        group: dist.ProcessGroup,
        kernels: Kernels,
    ) -> Tensor:
        """Return the summed loss in nats, fp32 `[]`, of `logits` `[..., V]`, `labels` and `weights` `[...]`."""
        scores, targets = logits.flatten(0, -2), labels.flatten()
        own_largest, sums, label_logits = kernels.vocabulary_statistics(scores, targets, first)
        largest = own_largest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        both = torch.stack([sums * (own_largest - largest).exp(), label_logits])
        dist.all_reduce(both, group=group)
        log_sum = both[0].log()
        valid = targets != IGNORE_INDEX
        # Subtract in this order: `largest` may be far larger than the loss.
        losses = (log_sum - (both[1] - largest)).where(valid, 0.0)
        flat_weights = None if weights is None else weights.flatten().float()
        ctx.save_for_backward(scores, targets, largest + log_sum, flat_weights)
        ctx.first, ctx.shape, ctx.kernels, ctx.is_spent = first, logits.shape, kernels, False
        return losses.sum() if flat_weights is None else (losses * flat_weights).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of the logits `[..., V]` for that of the loss `[]`, in the logits' own memory."""
        assert not ctx.is_spent, "the logits of this loss were overwritten with their gradient"
        ctx.is_spent = True
        scores, targets, logsumexp, weights = ctx.saved_tensors
        factors = gradients[0].expand(targets.shape) if weights is None else weights * gradients[0]
        ctx.kernels.vocabulary_gradient_(scores, targets, ctx.first, logsumexp, factors)
        return scores.view(ctx.shape), None, None, None, None, None

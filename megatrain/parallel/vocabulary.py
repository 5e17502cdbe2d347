"""Cross-entropy over a vocabulary that is cut over a tensor group: no rank ever gathers a token's logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.data.batch import IGNORE_INDEX


def vocabulary_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None, first: int, group: dist.ProcessGroup
) -> Tensor:
    """`kernels.cross_entropy.cross_entropy_sum` where `logits` `[..., V_local]` hold the vocabulary's rows from `first` on.

    `labels` (whole vocabulary's ids) and `weights` are `[...]`, equal on all ranks of the group, as is the result. Three
    reductions of one number a token: the largest logit, the sum of exponentials, the label's logit (Shoeybi et al.,
    2019, arXiv:1909.08053, section 3).
    """
    result: Tensor = _CrossEntropy.apply(logits, labels, weights, first, group)
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor | None, first: int, group: dist.ProcessGroup
    ) -> Tensor:
        scores, targets = logits.flatten(0, -2).float(), labels.flatten()
        largest = scores.amax(dim=-1) if scores.shape[-1] else scores.new_full((len(targets),), -torch.inf)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        exponentials = (scores - largest[:, None]).exp_()
        local = targets - first
        mine = (local >= 0) & (local < scores.shape[-1])
        local = local.where(mine, 0)
        sums = torch.zeros(2, len(targets), dtype=torch.float32, device=scores.device)
        sums[0] = exponentials.sum(dim=-1)
        if scores.shape[-1]:
            sums[1] = (scores.gather(-1, local[:, None])[:, 0] - largest).where(mine, 0.0)
        dist.all_reduce(sums, group=group)
        valid = targets != IGNORE_INDEX
        weight = valid.float() if weights is None else weights.flatten().float().where(valid, 0.0)
        losses = (sums[0].log() - sums[1]).where(valid, 0.0)
        ctx.save_for_backward(exponentials.div_(sums[0][:, None]), local, mine, weight)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return (losses * weight).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        probabilities, local, mine, weight = ctx.saved_tensors
        difference = probabilities
        if difference.shape[-1]:
            difference = difference.scatter_add(-1, local[:, None], -mine.to(difference.dtype)[:, None])
        return (difference * (weight * gradients[0])[:, None]).to(ctx.dtype).view(ctx.shape), None, None, None, None

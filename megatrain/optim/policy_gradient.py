"""The clipped policy gradient of GRPO and PPO, with an optional KL term to a reference.

Advantages, the log-probabilities under which the replies were sampled, and the weights that decide how tokens and
replies are averaged come with the batch: `reinforcement/rollout.py` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.config import MethodConfig
from megatrain.data.batch import MicroBatch
from megatrain.kernels import IGNORE_INDEX
from megatrain.optim.objective import OutputHead


@dataclass(frozen=True)
class PolicyGradient:
    """The loss of sampled replies (Schulman et al., 2017, arXiv:1707.06347; Shao et al., 2024, arXiv:2402.03300).

    Each token's loss is `-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` for the ratio `r` of its probability now
    and when it was sampled, plus `kl` times the estimate `r (exp(d) - d - 1)` of the divergence from the reference
    (Schulman, "Approximating KL divergence", 2020), where `d` is the reference's log-probability minus the model's.
    The factor `r` makes its gradient unbiased (DeepSeek-V3.2, arXiv:2512.02556). Probabilities are those at
    `temperature`.
    """

    clip_low: float
    clip_high: float
    kl: float
    temperature: float

    @property
    def scalar_names(self) -> tuple[str, ...]:
        """Means over tokens: those whose ratio is clipped, |now - when sampled| in nats, and the KL estimate."""
        return ("clip_fraction", "log_prob_difference", *(("kl",) if self.kl else ()))

    def count(self, micro_batch: MicroBatch) -> int:
        """Return the number of sampled tokens."""
        return int((micro_batch.labels != IGNORE_INDEX).sum())

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summed loss and the sums of `scalar_names`."""
        old, advantages = micro_batch.old_log_probs, micro_batch.advantages
        assert old is not None and advantages is not None
        counts = micro_batch.labels != IGNORE_INDEX
        if self.temperature != 1:
            hidden = hidden / self.temperature  # the head is linear, so this divides the logits
        now = head.token_log_probs(hidden, micro_batch.labels)
        # logarithms of 0 where nothing counts: a padding of NaN there would make the gradients NaN
        change = torch.where(counts, now - old, 0.0)
        ratio = change.exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        losses = -torch.minimum(ratio * advantages, clipped * advantages)
        is_clipped = ((ratio < 1 - self.clip_low) & (advantages < 0)) | (
            (ratio > 1 + self.clip_high) & (advantages > 0)
        )
        scalars = [(is_clipped & counts).sum(), change.detach().abs().sum()]
        if self.kl:
            assert micro_batch.reference_log_probs is not None
            gap = torch.where(counts, micro_batch.reference_log_probs - now, 0.0)
            divergence = ratio * (gap.exp() - gap - 1)
            losses = losses + self.kl * divergence
            scalars.append(divergence.detach().sum())
        if micro_batch.loss_weights is not None:
            losses = losses * micro_batch.loss_weights
        return torch.where(counts, losses, 0.0).sum(), scalars


def policy_gradient(method: MethodConfig) -> PolicyGradient:
    """Return the objective of a method that samples."""
    high = method.clip if method.clip_high is None else method.clip_high
    return PolicyGradient(method.clip, high, method.kl, method.temperature)

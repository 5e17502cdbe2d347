"""The clipped policy gradient of GRPO and PPO, with an optional KL term to a reference, and the loss of PPO's values.

Advantages, returns, what was computed when the replies were sampled, and the weights that decide how tokens and replies
are averaged come with the batch: `reinforcement/rollout.py` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from megatrain.config import WITH_VALUES, MethodConfig
from megatrain.data.batch import MicroBatch
from megatrain.kernels import IGNORE_INDEX
from megatrain.optim.objective import OutputHead, ValueHead


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


@dataclass(frozen=True)
class ActorCritic:
    """The loss of `policy`, plus `value_weight` times that of a value head (Schulman et al., 2017, arXiv:1707.06347).

    A token's value `v`, given what stands before it, is to be its return `R`. Its loss is the larger one of
    `(v - R)^2 / 2` and `(w - R)^2 / 2` for the value `w` that lies within `value_clip` of the one at sampling, so that
    a step does not move values further than that (as in OpenAI's Baselines, ppo2).
    """

    policy: PolicyGradient
    value_weight: float
    value_clip: float | None

    @property
    def scalar_names(self) -> tuple[str, ...]:
        """Means over tokens: the policy's, the loss of values, and the share of values whose loss is clipped."""
        return (*self.policy.scalar_names, "value_loss", "value_clip_fraction")

    def count(self, micro_batch: MicroBatch) -> int:
        """Return the number of sampled tokens."""
        return self.policy.count(micro_batch)

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summed loss and the sums of `scalar_names`."""
        policy_loss, scalars = self.policy(head, hidden, micro_batch)
        old, returns = micro_batch.old_values, micro_batch.returns
        assert old is not None and returns is not None
        values = cast(ValueHead, head).token_values(hidden)
        losses, is_clipped = 0.5 * (values - returns) ** 2, torch.zeros_like(values, dtype=torch.bool)
        if self.value_clip is not None:
            near = old + (values - old).clamp(-self.value_clip, self.value_clip)
            clipped = 0.5 * (near - returns) ** 2
            is_clipped = clipped > losses
            losses = torch.maximum(losses, clipped)
        counts = micro_batch.labels != IGNORE_INDEX
        losses = torch.where(counts, losses, 0.0)
        weights = micro_batch.loss_weights
        weighted = losses if weights is None else losses * weights
        found = [*scalars, losses.detach().sum(), (is_clipped & counts).sum()]
        return policy_loss + self.value_weight * weighted.sum(), found


def policy_gradient(method: MethodConfig) -> PolicyGradient | ActorCritic:
    """Return the objective of a method that samples. GRPO's KL term is in the loss, PPO's in the rewards."""
    high = method.clip if method.clip_high is None else method.clip_high
    has_values = method.name in WITH_VALUES
    policy = PolicyGradient(method.clip, high, 0.0 if has_values else method.kl, method.temperature)
    return ActorCritic(policy, method.value_weight, method.value_clip) if has_values else policy

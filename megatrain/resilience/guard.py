"""Whether a step's loss leaps out of those before it, and what is told when it does so again and again. Imports no torch.

Judging alone: rolling back is launch/rollback.py's, and when to judge the trainer's. Losses that are not finite never get
here, for the engines veto such steps before they move a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from megatrain.config import ResilienceConfig

NORMAL = 1.4826
"""Median absolute deviation to standard deviation, for normal noise (Rousseeuw and Croux, 1993)."""

FLOOR = 0.01
"""Smallest deviation that is reckoned with, as a share of the median (of 1 nat, where that is less): losses that hardly
differ would make any step a spike."""

ENOUGH = 32
"""Losses that must be known before one is judged, unless the window is shorter."""


@dataclass(frozen=True)
class Spike:
    """A loss that leapt: `zscore` is how many robust standard deviations it lies above the `median` of those before."""

    step: int
    loss: float
    zscore: float
    median: float


@dataclass(frozen=True)
class LossGuard:
    """Judges a loss by the median and the median absolute deviation of up to `window` losses before it.

    It keeps nothing: the losses are the caller's, who saves them in checkpoints, so that a resumed run judges as one that
    nothing disturbed. All ranks judge the same global loss, so they come to the same verdict without asking each other.
    """

    zscore: float
    window: int

    @classmethod
    def from_config(cls, config: ResilienceConfig) -> LossGuard:
        """The guard of a run; a `resilience.spike_zscore` of 0 never finds anything."""
        return cls(config.spike_zscore or math.inf, config.spike_window)

    def judge(self, before: Sequence[float], step: int, loss: float) -> Spike | None:
        """The spike that this loss is, if it is one; only upward ones are."""
        recent = before[-self.window :]
        if len(recent) < min(ENOUGH, self.window) or not math.isfinite(loss):
            return None
        middle = median(recent)
        deviation = NORMAL * median(abs(other - middle) for other in recent)
        zscore = (loss - middle) / max(deviation, FLOOR * max(1.0, middle))
        return Spike(step, loss, zscore, middle) if zscore > self.zscore else None

    def remember(self, before: Sequence[float], loss: float) -> list[float]:
        """The losses to judge the next one by."""
        return [*before, loss][-self.window :] if math.isfinite(loss) else list(before)


def report(spike: Spike, rollbacks: Iterable[dict[str, Any]]) -> str:
    """What a guard that gives up has seen: each spike with what was skipped for it, then the one that was too many."""
    told = [
        f"step {seen['step']} (loss {seen['loss']:.4f}, z {seen['zscore']:.1f}, samples {seen['skip_range'][0]} to "
        f"{seen['skip_range'][1] - 1} skipped)"
        for seen in rollbacks
    ]
    last = f"step {spike.step} (loss {spike.loss:.4f}, z {spike.zscore:.1f}, median {spike.median:.4f})"
    return "; ".join([*told, last])

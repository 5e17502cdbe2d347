"""Detect loss spikes, and describe them when the guard gives up. Imports no torch.

The trainer decides when to judge a loss, and `training/rollback.py` rolls back. The guard ignores losses that are not
finite: the engines skip the update of such steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from megatrain.config import ResilienceConfig

NORMAL = 1.4826
"""Factor from median absolute deviation to standard deviation, for normal noise (Rousseeuw and Croux, 1993)."""

FLOOR = 0.01
"""Lower bound of the deviation, as a share of the median (or of 1 nat if the median is less).

Without it, any step would be a spike when the losses hardly differ.
"""

ENOUGH = 32
"""Earlier losses needed to judge one; fewer if the window is shorter."""


@dataclass(frozen=True)
class Spike:
    """A loss spike: `zscore` robust standard deviations above the `median` of earlier losses."""

    step: int
    loss: float
    zscore: float
    median: float


@dataclass(frozen=True)
class LossGuard:
    """Judges a loss by the median and the median absolute deviation of up to `window` earlier losses.

    The guard is stateless: the caller keeps the losses and saves them in checkpoints, so that a resumed run reaches the
    same verdicts as an undisturbed one. All ranks judge the same global loss and so agree without communication.
    """

    zscore: float
    window: int

    @classmethod
    def from_config(cls, config: ResilienceConfig) -> LossGuard:
        """Create the guard of a run. With `resilience.spike_zscore=0` it never finds a spike."""
        return cls(config.spike_zscore or math.inf, config.spike_window)

    def judge(self, before: Sequence[float], step: int, loss: float) -> Spike | None:
        """Return the spike if `loss` is one, given the losses `before` it, else None. Only upward jumps count."""
        recent = before[-self.window :]
        if len(recent) < min(ENOUGH, self.window) or not math.isfinite(loss):
            return None
        middle = median(recent)
        deviation = NORMAL * median(abs(other - middle) for other in recent)
        zscore = (loss - middle) / max(deviation, FLOOR * max(1.0, middle))
        return Spike(step, loss, zscore, middle) if zscore > self.zscore else None

    def remember(self, before: Sequence[float], loss: float) -> list[float]:
        """Return the losses to judge the next one by."""
        return [*before, loss][-self.window :] if math.isfinite(loss) else list(before)


def report(spike: Spike, rollbacks: Iterable[dict[str, Any]]) -> str:
    """Describe all spikes when the guard gives up: each earlier one and the samples skipped for it, then the last."""
    earlier = [
        f"step {seen['step']} (loss {seen['loss']:.4f}, z {seen['zscore']:.1f}, samples {seen['skip_range'][0]} to "
        f"{seen['skip_range'][1] - 1} skipped)"
        for seen in rollbacks
    ]
    last = f"step {spike.step} (loss {spike.loss:.4f}, z {spike.zscore:.1f}, median {spike.median:.4f})"
    return "; ".join([*earlier, last])

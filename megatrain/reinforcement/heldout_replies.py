"""Held-out reward: what a run's rewards give the model's greedy replies to prompts that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatrain.data.prompts import Prompts
from megatrain.reinforcement.stream import RolloutStream


@dataclass(frozen=True)
class HeldoutReplies:
    """The first `limit` (None: all) held-out prompts of a run. All ranks must call it together."""

    prompts: Prompts
    stream: RolloutStream
    limit: int | None

    def __call__(self, step: int, beat: Callable[[str], None]) -> dict[str, float]:
        """Let the engine's weights reply; return the metrics of `RolloutStream.reply_greedily` as `heldout_<name>`.

        Raises RewardError or DivergedError on every rank, as a rollout does.
        """
        count = len(self.prompts) if self.limit is None else min(self.limit, len(self.prompts))
        beat(f"replying to {count} held-out prompts")
        found = self.stream.reply_greedily([self.prompts.read(number) for number in range(count)])
        return {f"heldout_{name}": value for name, value in found.items()}

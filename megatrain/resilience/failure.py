"""Failures of ranks, and how often the same one has occurred. Imports no torch.

Failures are recorded in the run's events.jsonl, so a requeued job also counts those of its earlier starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

SAME_FAILURES = 3
"""A job ends (exit code 6) once the same failure has occurred this many times at the same step without progress."""


@dataclass(frozen=True)
class Failure:
    """How a rank failed: `how` is a signal's name or `hang`; `step` (1-based) and `phase` are where it was."""

    how: str
    rank: int
    step: int
    phase: str
    host: str
    detail: str = ""

    def event(self) -> dict[str, Any]:
        """Return the fields of the event in events.jsonl, without `step`."""
        return {name: value for name, value in asdict(self).items() if name != "step" and value != ""}

    def __str__(self) -> str:
        what = "hung" if self.how == "hang" else f"was killed by {self.how}"
        oom = " (out of memory, perhaps)" if self.how == "SIGKILL" else ""
        where = f"at step {self.step} in {self.phase}" if self.step else f"in {self.phase}, before its first step"
        return f"rank {self.rank} on {self.host} {what}{oom} {where}" + (f": {self.detail}" if self.detail else "")


def times_seen(failure: Failure, events: Iterable[dict[str, Any]]) -> int:
    """Return how many times in a row this failure has occurred at this step, this time included.

    `events` are the run's earlier events. A checkpoint of that step or a later one is progress and resets the count, so
    failures before the first step (step 0) may recur now and then in a long run.
    """
    count = 1
    for event in reversed(list(events)):
        if event["kind"] == "save" and event["step"] >= failure.step:
            break
        if event["kind"] == "failure":
            if (event.get("how"), event["step"]) != (failure.how, failure.step):
                break
            count += 1
    return count

"""What ended a start of the workers, and whether starting them again can help. Imports no torch.

The record of failures is the run's events.jsonl, so that requeued jobs count what earlier ones met.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

SAME_FAILURES = 3
"""The same failure at the same step so many times, with no step further between them, ends a job (exit code 6)."""


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
        """What events.jsonl keeps of it, `step` apart."""
        return {name: value for name, value in asdict(self).items() if name != "step" and value != ""}

    def __str__(self) -> str:
        what = "hung" if self.how == "hang" else f"was killed by {self.how}"
        oom = " (out of memory, perhaps)" if self.how == "SIGKILL" else ""
        where = f"at step {self.step} in {self.phase}" if self.step else f"in {self.phase}, before its first step"
        return f"rank {self.rank} on {self.host} {what}{oom} {where}" + (f": {self.detail}" if self.detail else "")


def times_seen(failure: Failure, events: Iterable[dict[str, Any]]) -> int:
    """How often a run met this failure at this step on end, this time included; `events` are those before it. A checkpoint
    of that step or a later one is progress: at a start (step 0) the same may happen now and then in a run's life."""
    count = 1
    for event in reversed(list(events)):
        if event["kind"] == "save" and event["step"] >= failure.step:
            break
        if event["kind"] == "failure":
            if (event.get("how"), event["step"]) != (failure.how, failure.step):
                break
            count += 1
    return count

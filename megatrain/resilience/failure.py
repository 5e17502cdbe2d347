"""Failures of ranks, and how often the same one has occurred. Imports no torch.

Failures are recorded in the run's events.jsonl, so a requeued job also counts those of its earlier starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from megatrain.resilience.fault_classes import MACHINE, MEMORY

SAME_FAILURES = 3
"""A job ends (exit code 6) once the same failure has occurred this many times at the same step without progress."""

MEMORY_FAILURES = 2
"""The same for want of memory, at any step and place: an allocator that starts afresh helps once or not at all."""

BEFORE_ANY_STEP = 2
"""A job ends with the error's own exit code once it fails this often in a row, at the same place, before any step."""

SIGNAL = "signal"
HANG = "hang"
EXIT = "exit"

SUSPECT_AFTER = 2
"""Faults of the machine after which a host is suspected."""

SUSPECT_WINDOW_S = 24 * 3600.0
"""Seconds for which a fault of the machine counts against its host."""


@dataclass(frozen=True)
class Failure:
    """How a rank failed: `how` is a signal's name, `hang`, `exit code 0` and so on, or an exception's type.

    `kind` is `signal`, `hang`, `exit` or the exception's class (`fault_classes.py`); `step` (1-based) and `phase` are
    where the rank was, `finished` is the number of steps it had finished since its start. For an exception, `detail` is
    its message, `place` the line that raised it and `trace` its stack trace.
    """

    how: str
    rank: int
    step: int
    phase: str
    host: str
    detail: str = ""
    kind: str = SIGNAL
    place: str = ""
    trace: str = ""
    finished: int = 0

    def event(self) -> dict[str, Any]:
        """Return the fields of the event in events.jsonl, without `step`."""
        fields: dict[str, Any] = {"how": self.how, "rank": self.rank, "phase": self.phase, "host": self.host}
        if self.kind not in (SIGNAL, HANG, EXIT):
            fields |= {"class": self.kind, "place": self.place, "trace": self.trace, "finished": self.finished}
        return fields | ({"detail": self.detail} if self.detail else {})

    def __str__(self) -> str:
        if self.kind == HANG:
            what = "hung"
        elif self.kind == SIGNAL:
            what = f"was killed by {self.how}" + (" (out of memory, perhaps)" if self.how == "SIGKILL" else "")
        elif self.kind == EXIT:
            what = f"ended with {self.how}"
        elif self.kind == MEMORY:
            what = "ran out of memory"
        else:
            what = f"raised {self.how}"
        where = f"at step {self.step} in {self.phase}" if self.step else f"in {self.phase}, before its first step"
        without = ", without finishing, saving or reporting an error" if self.kind == EXIT else ""
        return f"rank {self.rank} on {self.host} {what} {where}{without}" + (f": {self.detail}" if self.detail else "")


def times_seen(failure: Failure, events: Iterable[dict[str, Any]]) -> int:
    """Return how many times in a row this failure has occurred, this time included.

    `events` are the run's earlier events. A failure is the same at the same step and place, whatever its message says,
    which often holds sizes, addresses and process ids. For want of memory step and place do not matter: which
    allocation is one too many is chance. A checkpoint of the earlier failure's step or a later one is progress and
    resets the count, so failures before the first step (step 0) may recur now and then in a long run.
    """
    count, saved = 1, -1
    for event in reversed(list(events)):
        if event["kind"] == "save":
            saved = max(saved, event["step"])
        elif event["kind"] == "failure":
            if saved >= event["step"] or not _is_same(failure, event):
                break
            count += 1
    return count


def _is_same(failure: Failure, event: dict[str, Any]) -> bool:
    """Return whether an earlier failure's event tells of the same failure."""
    if failure.kind == MEMORY:
        return event.get("class") == MEMORY
    return (event.get("how"), event.get("place", ""), event["step"]) == (failure.how, failure.place, failure.step)


def failed_alike_before_any_step(failure: Failure, events: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the run's last failure if it was the same exception at the same place, and neither start did a step."""
    if failure.finished:
        return None
    for event in reversed(list(events)):
        if event["kind"] == "save":
            return None
        if event["kind"] == "failure":
            alike = (event.get("how"), event.get("place"), event.get("finished")) == (failure.how, failure.place, 0)
            return event if alike else None
    return None


def suspects(hosts: Iterable[str], events: Iterable[dict[str, Any]], now: float) -> list[str]:
    """Return those of `hosts` that had faults of the machine at least `SUSPECT_AFTER` times in the last day.

    `events` are the run's events and `now` is a Unix time. A rank that only lost another rank does not count against
    its host.
    """
    counts = Counter(
        event.get("host")
        for event in events
        if event["kind"] == "failure"
        and event.get("class") == MACHINE
        and now - seconds_of(event["time"]) < SUSPECT_WINDOW_S
    )
    return sorted(host for host in set(hosts) if counts[host] >= SUSPECT_AFTER)


def seconds_of(time: str) -> float:
    """Return the seconds since 1970 of a time in records. Python 3.10 does not read the Z at its end."""
    return datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp()

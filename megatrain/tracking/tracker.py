"""What a tracker is, and how several of them are held without ever endangering the run. Imports no torch.

A tracker shows a run to people: the console, MLflow. The record that the run itself relies on, metrics.jsonl and
events.jsonl, is written by metrics.py and events.py. Only rank 0 owns trackers; other ranks hold an empty `Trackers`.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

STATUSES = ("done", "stopped", "failed")
"""How a run can end: all steps done (or early stopping), saved after a signal, an error."""


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told once, before the first step.

    `config` is the resolved config as nested plain dicts; `resumed_from_step` is None for a run that starts at its
    first step; `flops_per_token` counts forward and backward; `layout` is a short text such as `dp=2 zero=3`;
    `dataset` is the dataset's card as a plain dict.
    """

    run_name: str
    run_dir: Path
    config: dict[str, Any]
    resumed_from_step: int | None = None
    num_parameters: int = 0
    flops_per_token: float = 0.0
    world_size: int = 1
    device: str = "cpu"
    layout: str = ""
    dataset: dict[str, Any] = field(default_factory=dict)
    dataset_fingerprint: str = ""
    git_commit: str | None = None
    host: str = ""


class Tracker(Protocol):
    """Something that shows a run. No method may block the training thread for longer than microseconds, `finish`
    apart, which waits for a bounded time."""

    def start(self, info: RunInfo) -> None:
        """Called once, after metrics.jsonl was cut to the step that is resumed from."""

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step: the object that metrics.jsonl holds for it, already written there."""

    def event(self, event: dict[str, Any]) -> None:
        """One event: the object that events.jsonl holds for it, already written there."""

    def finish(self, status: str) -> None:
        """Called once at the end, with one of `STATUSES`."""

    def abandon(self) -> None:
        """In place of `finish`, where the run is about to go on in another process: let go at once."""


class Trackers:
    """Several trackers as one. Tracking is never fatal: one that raises is warned about once and left out from then
    on, save for `finish`, which it still gets so that it can let go of what it holds."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)
        self._failed: set[int] = set()

    def start(self, info: RunInfo) -> None:
        self._each(lambda tracker: tracker.start(info))

    def step(self, record: dict[str, Any]) -> None:
        self._each(lambda tracker: tracker.step(record))

    def event(self, event: dict[str, Any]) -> None:
        self._each(lambda tracker: tracker.event(event))

    def finish(self, status: str) -> None:
        assert status in STATUSES, status
        self._each(lambda tracker: tracker.finish(status), failed_too=True)

    def abandon(self) -> None:
        self._each(lambda tracker: tracker.abandon(), failed_too=True)

    def _each(self, call: Callable[[Tracker], None], failed_too: bool = False) -> None:
        for index, tracker in enumerate(self._trackers):
            if index in self._failed and not failed_too:
                continue
            try:
                call(tracker)
            except Exception as error:
                if index not in self._failed:
                    self._failed.add(index)
                    logging.getLogger("megatrain.tracking").warning(
                        "%s failed and is left out from now on; training goes on (%s: %s)",
                        type(tracker).__name__,
                        type(error).__name__,
                        error,
                    )


def git_commit(folder: Path) -> str | None:
    """The commit checked out at `folder`, with `-dirty` where tracked files differ from it; None outside git."""
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=False,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None if described.returncode == 0 else None

"""The tracker protocol, and `Trackers`, which keeps a failing tracker from stopping the run. Imports no torch.

A tracker shows a run to people: the console, MLflow. metrics.py and events.py write the records that the run itself
relies on. Only rank 0 has trackers; other ranks hold an empty `Trackers`.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

STATUSES = ("done", "stopped", "failed")
"""How a run can end: all steps done or stopped early; saved after a signal; an error."""


@dataclass(frozen=True)
class RunInfo:
    """What a tracker receives once, before the first step.

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
    """A view of a run, such as the console.

    No method may block the training thread for more than microseconds, except `finish`, which waits a bounded time.
    """

    def start(self, info: RunInfo) -> None:
        """Show the start. Called once, after metrics.jsonl was cut back to the step to resume from."""

    def step(self, record: dict[str, Any]) -> None:
        """Show an optimizer step, whose record has been written to metrics.jsonl."""

    def event(self, event: dict[str, Any]) -> None:
        """Show an event, whose record has been written to events.jsonl."""

    def progress(self, step: int, text: str) -> None:
        """Show what the run does besides steps (an evaluation, a save) until the next step or event."""

    def finish(self, status: str) -> None:
        """Show the end, one of `STATUSES`, and release everything. Called once."""

    def abandon(self) -> None:
        """Release everything at once. Called instead of `finish` when the run continues in another process."""


class Trackers:
    """Several trackers as one. Tracking is never fatal.

    A tracker that raises is logged once and skipped from then on, except for `finish` and `abandon`, which let it
    release its resources.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)
        self._failed: set[int] = set()

    def start(self, info: RunInfo) -> None:
        """Start every tracker."""
        self._each(lambda tracker: tracker.start(info))

    def step(self, record: dict[str, Any]) -> None:
        """Pass a step on to every tracker that has not failed."""
        self._each(lambda tracker: tracker.step(record))

    def event(self, event: dict[str, Any]) -> None:
        """Pass an event on to every tracker that has not failed."""
        self._each(lambda tracker: tracker.event(event))

    def progress(self, step: int, text: str) -> None:
        """Pass the progress of an evaluation or save on to every tracker that has not failed."""
        self._each(lambda tracker: tracker.progress(step, text))

    def finish(self, status: str) -> None:
        """Finish every tracker, failed ones too."""
        assert status in STATUSES, status
        self._each(lambda tracker: tracker.finish(status), failed_too=True)

    def abandon(self) -> None:
        """Abandon every tracker, failed ones too."""
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
                        "%s failed and is skipped from now on; training goes on (%s: %s)",
                        type(tracker).__name__,
                        type(error).__name__,
                        error,
                    )


def git_commit(folder: Path) -> str | None:
    """Return the commit checked out at `folder`, with `-dirty` if tracked files differ; None outside git."""
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

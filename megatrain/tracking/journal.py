"""The main rank's records of a run: metrics.jsonl and events.jsonl first, then every tracker.

The other ranks hold a journal without files or trackers, so the trainer does not need to know its rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.tracking.events import EventLog
from megatrain.tracking.metrics import MetricsLog
from megatrain.tracking.tracker import RunInfo, Trackers

_LOG = logging.getLogger("megatrain")

START_DETAIL = ("host", "world_size", "device", "layout", "num_parameters", "git_commit")
"""Fields of `RunInfo` in start and resume events."""


class Journal:
    """metrics.jsonl, events.jsonl and the trackers of one run, or none of them (`Journal(None)`)."""

    def __init__(
        self, run_dir: Path | None, trackers: Trackers | None = None, may_write: Callable[[], None] = lambda: None
    ) -> None:
        """`may_write` raises OwnedError once another job owns the run."""
        self._may_write = may_write
        self._trackers = trackers or Trackers()
        self._metrics = MetricsLog(run_dir / "metrics.jsonl") if run_dir else None
        self._events = EventLog(run_dir / "events.jsonl") if run_dir else None

    def start(self, info: RunInfo, step: int, **further: Any) -> None:
        """Cut the metrics back to `step`, record the start or resume, and start the trackers."""
        if self._metrics is None or self._events is None:
            return
        self._may_write()
        cut = self._metrics.resume(step)
        detail = {name: getattr(info, name) for name in START_DETAIL} | further
        if cut:
            detail["cut_metrics"] = str(cut)
        if lost := self._metrics.lacks(step):
            detail["lost_metrics"] = f"steps {lost[0]} to {lost[1]}"
            _LOG.warning(
                "%s is damaged: it lacks %s; what could not be read is in %s",
                *(self._metrics.path, detail["lost_metrics"], self._metrics.unreadable),
            )
        kind = "start" if info.resumed_from_step is None else "resume"
        event = self._events.emit(kind, step, **detail)  # before the trackers start: MLflow's helper reads the file
        self._trackers.start(info)
        self._trackers.event(event)

    def cut(self, step: int) -> Path | None:
        """Cut the metrics back to `step` for a rollback. Return the path of what was cut, or None if nothing was."""
        if self._metrics is None:
            return None
        self._may_write()
        return self._metrics.resume(step)

    def step(self, record: dict[str, Any]) -> None:
        """Record one optimizer step."""
        if self._metrics is not None:
            self._may_write()
            self._trackers.step(self._metrics.append(record))

    def event(self, kind: str, step: int, **detail: Any) -> None:
        """Record an event."""
        if self._events is not None:
            self._trackers.event(self._events.emit(kind, step, **detail))

    def progress(self, step: int, text: str) -> None:
        """Show what the run does besides steps, until the next step or event. Nothing is recorded."""
        if self._events is not None:
            self._trackers.progress(step, text)

    def finish(self, status: str, step: int, **detail: Any) -> None:
        """Record the end of the run, with one of `tracker.STATUSES`, and close everything."""
        self.event("stop", step, status=status, **detail)
        self._trackers.finish(status)
        self._close()

    def abandon(self) -> None:
        """Close everything without recording an end: nothing started, or the run continues in another process."""
        self._trackers.abandon()
        self._close()

    def _close(self) -> None:
        for log in (self._metrics, self._events):
            if log is not None:
                log.close()

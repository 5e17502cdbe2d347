"""What the main rank writes down while it trains: metrics.jsonl and events.jsonl first, then every tracker.

The other ranks hold a journal without files and trackers, so that the trainer need not know which one it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.tracking.events import EventLog
from megatrain.tracking.metrics import MetricsLog
from megatrain.tracking.tracker import RunInfo, Trackers

START_DETAIL = ("host", "world_size", "device", "layout", "num_parameters", "git_commit")
"""What of `RunInfo` the start and resume events carry."""


class Journal:
    """metrics.jsonl, events.jsonl and the trackers of one run, or nothing at all (`Journal(None)`)."""

    def __init__(
        self, run_dir: Path | None, trackers: Trackers | None = None, may_write: Callable[[], None] = lambda: None
    ) -> None:
        """`may_write` raises OwnedError once another job owns the run."""
        self._may_write = may_write
        self._trackers = trackers or Trackers()
        self._metrics = MetricsLog(run_dir / "metrics.jsonl") if run_dir else None
        self._events = EventLog(run_dir / "events.jsonl") if run_dir else None

    def start(self, info: RunInfo, step: int, **further: Any) -> None:
        """Cut the metrics back to `step`, say that the run starts or resumes, and start the trackers."""
        if self._metrics is None or self._events is None:
            return
        self._may_write()
        cut = self._metrics.resume(step)
        detail = {name: getattr(info, name) for name in START_DETAIL} | further
        if cut:
            detail["cut_metrics"] = str(cut)
        kind = "start" if info.resumed_from_step is None else "resume"
        event = self._events.emit(kind, step, **detail)  # first: a tracker's helper reads the file
        self._trackers.start(info)
        self._trackers.event(event)

    def cut(self, step: int) -> Path | None:
        """Cut the metrics back to `step`, where a rollback goes on; where the cut tail is kept, if there was one."""
        if self._metrics is None:
            return None
        self._may_write()
        return self._metrics.resume(step)

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step's record."""
        if self._metrics is not None:
            self._may_write()
            self._trackers.step(self._metrics.append(record))

    def event(self, kind: str, step: int, **detail: Any) -> None:
        """Something that happened."""
        if self._events is not None:
            self._trackers.event(self._events.emit(kind, step, **detail))

    def finish(self, status: str, step: int, **detail: Any) -> None:
        """The run ends, with one of `tracking.base.STATUSES`."""
        self.event("stop", step, status=status, **detail)
        self._trackers.finish(status)
        self._close()

    def abandon(self) -> None:
        """The run ends here without a word: nothing was begun, or it goes on in another process."""
        self._trackers.abandon()
        self._close()

    def _close(self) -> None:
        for log in (self._metrics, self._events):
            if log is not None:
                log.close()

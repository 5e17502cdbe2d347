"""Show progress in bytes: a bar with MB/s on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
"""Seconds between lines where there is no terminal to redraw."""

_REDRAW_EVERY_S = 0.1


class Meter:
    """The progress of one stage. `total` is in bytes, None if unknown. Drawn by `update`, not by a thread."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label, self._total, self._done = label, total, 0
        self._shown: int | None = None
        self._start = self._drawn = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = [
                TextColumn("{task.description:10}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
            ]
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), auto_refresh=False)
            self._task = self._bar.add_task(label, total=total, rate="")

    def update(self, done: int) -> None:
        """Set the number of bytes done so far."""
        self._done = done
        now = time.monotonic()
        if now - self._drawn >= (_REDRAW_EVERY_S if self._bar else LINE_EVERY_S):
            self._drawn = now
            self._draw()

    def rate(self) -> float:
        """Return bytes per second since the start."""
        return self._done / max(time.monotonic() - self._start, 1e-9)

    def _draw(self) -> None:
        self._shown = self._done
        rate = f"{self._done / 1e6:.1f} MB, {self.rate() / 1e6:.1f} MB/s"
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=rate)
            self._bar.refresh()
        else:
            share = f" ({100 * self._done / self._total:.0f}%)" if self._total else ""
            print(f"{self._label}: {rate}{share}", file=sys.stderr, flush=True)

    def __enter__(self) -> Meter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and (self._bar or self._shown != self._done):  # else the last line, or the error, says it
            self._draw()
        if self._bar:
            self._bar.stop()

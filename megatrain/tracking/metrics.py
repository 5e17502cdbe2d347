"""metrics.jsonl: one JSON object per optimizer step, in ascending order, with one writer. Imports no torch.

Resuming, the report and MLflow rely on this record. The trainer decides what the numbers mean.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatrain.errors import DataError

FIRST_WINDOW = 1 << 16
"""Bytes that `MetricsLog.resume` reads from the end of the file before it doubles the window."""


def now() -> str:
    """Return the time in UTC as ISO 8601 with milliseconds: `2026-01-31T12:00:00.123Z`."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_json(value: Any) -> str:
    """Return `value` as one line of standard JSON: floats in full precision, NaN and infinities as null.

    JSON has no NaN, and plots leave nulls out. `updated: false` marks a skipped step.
    """
    return json.dumps(_finite(value), allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


class MetricsLog:
    """The one writer of a run's metrics.jsonl.

    A new run calls `append` at once, or `resume(0)` first. A resumed run calls `resume` with the step of its
    checkpoint. Each line reaches the operating system before `append` returns.

    Raises:
        OSError: the disk fails. The run depends on this file, so the error is not swallowed.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (held open for the length of the run)
        before = set(self._cut_files())
        self._last_step = self._keep_until(None)
        self.unreadable = next((path for path in self._cut_files() if path not in before), None)
        """Where the end of the file is now that could not be read when it was opened; None if all could."""

    def append(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write one step and return what was written: `record` with the current `time`.

        Raises:
            ValueError: `record["step"]` is not greater than the last step written.
        """
        step = record["step"]
        if step <= self._last_step:
            raise ValueError(f"step {step} does not follow step {self._last_step} of {self.path}")
        written = {**record, "time": now()}
        line = memoryview((to_json(written) + "\n").encode())
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:  # which names no file
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._last_step = step
        return written

    def resume(self, step: int) -> Path | None:
        """Move the lines after `step` to `metrics.cut-<n>.jsonl` and return its path, or None if there are none."""
        before = set(self._cut_files())
        self._last_step = self._keep_until(step)
        return next((path for path in self._cut_files() if path not in before), None)

    def lacks(self, step: int) -> tuple[int, int] | None:
        """Return the first and last of the steps up to `step` that were in what could not be read; None if none was."""
        return (self._last_step + 1, step) if self.unreadable and self._last_step < step else None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cut_files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.cut-*{self.path.suffix}"))

    def _keep_until(self, step: int | None) -> int:
        """Move all after the last complete line (of `step` or before) to a file of its own. Return that line's step."""
        data_end, last_step = _last_line(self.path, step)
        size = os.path.getsize(self.path)
        if data_end < size:
            numbers = [path.stem.rsplit("-", 1)[1] for path in self._cut_files()]
            number = 1 + max((int(text) for text in numbers if text.isdigit()), default=0)
            aside = self.path.with_name(f"{self.path.stem}.cut-{number}{self.path.suffix}")
            with open(self.path, "rb") as source, open(aside, "xb") as target:
                source.seek(data_end)
                while block := source.read(1 << 20):
                    target.write(block)
                target.flush()
                os.fsync(target.fileno())
            os.truncate(self.path, data_end)
        return last_step


def _last_line(path: Path, step: int | None) -> tuple[int, int]:
    """Return the end offset and step of the last complete line up to `step` (None: any), or (0, 0) if there is none.

    Reads from the end in windows that double, so the cost depends on what is cut and not on the length of the run.
    """
    size = os.path.getsize(path)
    window = FIRST_WINDOW
    with open(path, "rb") as file:
        while True:
            start = max(0, size - window)
            file.seek(start)
            data = file.read(size - start)
            first = 0 if start == 0 else data.find(b"\n") + 1
            end = len(data)
            while (newline := data.rfind(b"\n", first, end)) >= 0:
                begin = max(first, data.rfind(b"\n", first, newline) + 1)
                record = _parse(data[begin:newline])
                if record is not None and (step is None or record["step"] <= step):
                    return start + newline + 1, record["step"]
                end = newline
            if start == 0:
                return 0, 0
            window *= 2


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def iter_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl, even while it is being written: skips a last line without a line feed.

    Raises:
        DataError: any other line is not a record of one step.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            record = _parse(line)
            if record is None:
                raise DataError(f"{path}, line {number}: not a record of one step: {line[:80]!r}")
            yield record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records of a metrics.jsonl; see `iter_metrics`."""
    return list(iter_metrics(path))

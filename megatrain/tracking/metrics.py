"""metrics.jsonl: one JSON object an optimizer step, in ascending order of steps, with one writer. Imports no torch.

This is the record that resuming, the report and MLflow rely on. What a number means is the trainer's business; what
is shown elsewhere is the trackers'.
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
"""Bytes that `MetricsLog.resume` looks at from the end of the file before it widens its view."""


def now() -> str:
    """The time in UTC as ISO 8601 with milliseconds: `2026-01-31T12:00:00.123Z`."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def to_json(value: Any) -> str:
    """`value` on one line of standard JSON: floats with all their digits, NaN and infinities as null.

    JSON has no NaN. Null is what plots leave out; `updated: false` tells that such a step was skipped.
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

    A fresh run calls `append` straight away or `resume(0)` first; a run that continues calls `resume` with the step
    of its checkpoint. Each line reaches the operating system before `append` returns. Raises OSError where the disk
    fails: this file is part of the run, not decoration.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (held open for the length of the run)
        self._last_step = self._keep_until(None)

    def append(self, record: dict[str, Any]) -> dict[str, Any]:
        """Writes one step and returns what was written: `record` with the `time` it was written at.

        Raises ValueError where `record["step"]` does not follow the last one: a step has one line.
        """
        step = record["step"]
        if step <= self._last_step:
            raise ValueError(f"step {step} does not follow step {self._last_step} of {self.path}")
        written = {**record, "time": now()}
        line = memoryview((to_json(written) + "\n").encode())
        while line:
            line = line[self._file.write(line) :]
        self._last_step = step
        return written

    def resume(self, step: int) -> Path | None:
        """Cuts what lies beyond `step` and keeps it aside in `metrics.cut-<n>.jsonl`, whose path is returned; None
        where nothing lay beyond."""
        before = set(self._cut_files())
        self._last_step = self._keep_until(step)
        return next((path for path in self._cut_files() if path not in before), None)

    def close(self) -> None:
        self._file.close()

    def _cut_files(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.cut-*{self.path.suffix}"))

    def _keep_until(self, step: int | None) -> int:
        """Moves what lies behind the last whole line (of at most `step`) into a file of its own; that line's step."""
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
    """Where the last whole line with a step of at most `step` (None: any) ends, and its step; (0, 0) without one.

    Reads from the end, in windows that double, so that resuming a long run costs what is cut and not what is kept.
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
    """The records of a metrics.jsonl one by one, also while it is being written: a last line without its line feed
    is left out. Raises DataError at any other line that is not a record."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            record = _parse(line)
            if record is None:
                raise DataError(f"{path}, line {number}: not a record of one step: {line[:80]!r}")
            yield record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; see `iter_metrics`."""
    return list(iter_metrics(path))

"""events.jsonl: what happened to a run and when, one JSON object per event. Imports no torch.

Several threads and processes may write to the same file (the agent records a restart, rank 0 a save), because each
event is a single write in append mode.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from megatrain.tracking.metrics import now, to_json


class EventLog:
    """A writer of a run's events.jsonl. Raises OSError if the disk fails."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")  # ends a partial line of a killed process; readers skip it

    def emit(self, kind: str, step: int, **detail: Any) -> dict[str, Any]:
        """Write `{"time", "kind", "step", ...detail}` and return it."""
        event = {"time": now(), "kind": kind, "step": step, **detail}
        line = to_json(event) + "\n"
        with self._lock:
            try:
                os.write(self._fd, line.encode())
            except OSError as error:  # which names no file
                raise OSError(error.errno, error.strerror, str(self.path)) from error
        return event

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return all complete events in the order they were written; skip partial lines of killed processes."""
    events = []
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "kind" in event:
            events.append(event)
    return events

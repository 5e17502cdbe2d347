"""A run's restarts and their reasons, read from its events.jsonl. Imports no torch.

A `start` or `resume` event is a restart if the run had started before: after a failure within a job, after a Slurm
requeue, or by hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.resilience.signals import signal_name


@dataclass(frozen=True)
class Restart:
    """The `number`-th restart: the run continued from `step` at `time` (ISO 8601), for the reason `why`."""

    number: int
    step: int
    time: str
    why: str


class Restarts:
    """A reader that follows the events in `path`, which may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._begun = False
        self._number = 0
        self._before: list[dict[str, Any]] = []  # events since the last start: the reason for the next

    def read(self) -> list[Restart]:
        """Return the restarts since the last call.

        A `start` without a preceding `restart` or `node_lost` event begins a new run in the same folder, which resets
        the count to zero.
        """
        found: list[Restart] = []
        for event in self._new_events():
            kind, step = event["kind"], event.get("step", 0)
            if kind in ("failure", "restart", "node_lost", "interrupt", "signal", "stop"):
                self._before.append(event)
            elif kind in ("start", "resume"):
                if kind == "start" and not any(one["kind"] in ("restart", "node_lost") for one in self._before):
                    self._number = 0
                    found.clear()
                elif self._begun:
                    self._number += 1
                    found.append(Restart(self._number, step, event["time"], f"{self._reason()}; from step {step}"))
                self._begun = True
                self._before.clear()
        return found

    def _new_events(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            lines = file.readlines()
        events = []
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self._offset += len(line)
            try:
                event = json.loads(line)
            except ValueError:  # a partial line of a killed process
                continue
            if isinstance(event, dict) and "kind" in event:
                events.append(event)
        return events

    def _reason(self) -> str:
        """Return what ended the previous start, in a few words."""
        failures = [one for one in self._before if one["kind"] in ("failure", "node_lost")]
        if failures:
            return ", then ".join(_describe(one) for one in failures)
        ends = [one for one in self._before if one["kind"] == "stop"]
        if not ends:
            return "ended without a word"
        signals = [one for one in self._before if one["kind"] in ("interrupt", "signal")]
        by = f" by {_cause(signals[0])}" if signals and ends[-1].get("status") == "stopped" else ""
        return f"{ends[-1].get('status')}{by} at step {ends[-1].get('step')}"


def _describe(event: dict[str, Any]) -> str:
    if event["kind"] == "node_lost":
        return f"node lost at step {event.get('step')}"
    return f"{event.get('how')} of rank {event.get('rank')} on {event.get('host')} at step {event.get('step')}"


def _cause(event: dict[str, Any]) -> str:
    return "Ctrl-C" if event["kind"] == "interrupt" else signal_name(event["signal"])

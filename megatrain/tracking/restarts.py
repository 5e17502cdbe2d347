"""Each time a run was started again, and why, read from its events.jsonl. Imports no torch.

A `start` or `resume` event is a restart where the run had begun before, be it within a job (a `failure` comes before it),
by Slurm's requeue or by hand.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Restart:
    """The `number`-th restart: the run went on from `step` at `time` (ISO 8601), because of what `why` tells."""

    number: int
    step: int
    time: str
    why: str


class Restarts:
    """Follows the events in `path`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._begun = False
        self._number = 0
        self._before: list[dict[str, Any]] = []  # the events since the last start that may tell the reason of the next

    def read(self) -> list[Restart]:
        """The restarts since the last call.

        A `start` that neither the agent nor a lost node led to begins the run anew, with no restarts yet: what came before
        was another run in this folder.
        """
        found: list[Restart] = []
        for event in self._new_events():
            kind, step = event["kind"], event.get("step", 0)
            if kind in ("failure", "restart", "node_lost", "signal", "stop"):
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
            except ValueError:  # a killed process left it half-written
                continue
            if isinstance(event, dict) and "kind" in event:
                events.append(event)
        return events

    def _reason(self) -> str:
        """What ended the start before, in a few words."""
        failures = [one for one in self._before if one["kind"] in ("failure", "node_lost")]
        if failures:
            return ", then ".join(_told(one) for one in failures)
        ends = [one for one in self._before if one["kind"] == "stop"]
        if not ends:
            return "ended without a word"
        signals = [one for one in self._before if one["kind"] == "signal"]
        by = f" by {_signal_name(signals[-1]['signal'])}" if signals and ends[-1].get("status") == "stopped" else ""
        return f"{ends[-1].get('status')}{by} at step {ends[-1].get('step')}"


def _told(event: dict[str, Any]) -> str:
    if event["kind"] == "node_lost":
        return f"node lost at step {event.get('step')}"
    return f"{event.get('how')} of rank {event.get('rank')} on {event.get('host')} at step {event.get('step')}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

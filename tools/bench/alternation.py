"""Two or more training jobs at once, of which only one runs at a time: the others are stopped (SIGSTOP).

They take turns of some seconds, so drift of the machine over minutes hits all. On one shared machine, turns of whole
processes differed by 15% where this found 0.0 to 1.3%.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from turns import TurnFailed, last_line

START_S = 300
"""Seconds that a job may need for its first steps."""

ENDLESS = 100_000
"""Steps of a job that is killed after the last turn."""

Records = list[dict[str, Any]]


class Job:
    """A `megatrain train`, as one process or several, stopped except in its turns."""

    def __init__(self, name: str, folder: Path) -> None:
        """`name` is its run.name, `folder` its working directory."""
        self.name = name
        self.folder = folder
        self.errors = folder / f"{name}.stderr"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], environ: dict[str, str]) -> None:
        """Start one of its processes."""
        with self.errors.open("ab") as errors:
            process = subprocess.Popen(command, cwd=self.folder, env=environ, stdout=subprocess.DEVNULL, stderr=errors)
        self.processes.append(process)

    def warm_up(self) -> None:
        """Run the first five steps, then stop.

        Raises:
            TurnFailed: it ended, or needs longer than START_S.
        """
        deadline = time.monotonic() + START_S
        while len(self._records()) < 5:
            self._check_alive()
            if time.monotonic() > deadline:
                raise TurnFailed(f"{self.name} finished fewer than five steps in {START_S} s")
            time.sleep(0.2)
        self.signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> Records:
        """Run for some seconds; return the records of the steps that began and ended in them, at least two.

        Raises:
            TurnFailed: it ended, or finished fewer.
        """
        before = len(self._records())
        self.signal(signal.SIGCONT)
        time.sleep(seconds)
        self.signal(signal.SIGSTOP)
        self._check_alive()
        whole = self._records()[before + 1 :]  # the first one was interrupted by the stop before
        if len(whole) < 2:
            raise TurnFailed(f"{self.name} finished {len(whole)} whole steps in {seconds:g} s; give more --seconds")
        return whole

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its processes and all their descendants."""
        for started in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                top = psutil.Process(started.pid)
                for process in (top, *top.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(number)

    def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def _records(self) -> Records:
        metrics = self.folder / "runs" / self.name / "metrics.jsonl"
        text = metrics.read_text() if metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _check_alive(self) -> None:
        if any(process.poll() is not None for process in self.processes):
            raise TurnFailed(f"{self.name} ended: {last_line(self.errors.read_text(errors='replace'))}")


def alternate(
    jobs: Sequence[Job], turns: int, seconds: float, figure: Callable[[Records], float]
) -> dict[str, list[float]]:
    """Return the figure of each turn, by the name of the job; every second round goes backwards. Kills the jobs last.

    Raises:
        TurnFailed: a job ended, was too slow to start, or finished too few steps in a turn.
    """
    try:
        for job in jobs:
            job.warm_up()
        found: dict[str, list[float]] = {job.name: [] for job in jobs}
        for number in range(turns):
            for job in jobs if number % 2 == 0 else reversed(jobs):
                found[job.name].append(figure(job.turn(seconds)))
        return found
    finally:
        for job in jobs:
            job.kill()

"""Compare a step's time between two checkouts of megatrain: python tools/bench/revisions.py OLD NEW --model tiny

Both train the same job at once, but only one runs at a time: the other is stopped (SIGSTOP). They take turns of some
seconds, so drift of the machine over minutes hits both. A turn's figure is the median of the steps that lie wholly in
it; the verdict is the median of new over old, with an interval that holds the true median with 95% probability. On one
shared machine, turns of whole processes differed by 15% where this found 0.0 to 1.3%.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from intervals import median_interval
from turns import TurnFailed, environ, last_line, prepare, usable_cores

START_S = 300
"""Seconds that a job may need for its first steps."""

ENDLESS = 100_000
"""Steps of a job that is killed after the last turn."""


def main() -> int:
    """Compare. Return 1 if a job failed, 2 if it is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout, such as: git worktree add ../old main~20")
    parser.add_argument("new", type=Path, help="the other one")
    parser.add_argument("--model", default="tiny", help="preset of conf/model (default tiny)")
    parser.add_argument("--turns", type=int, default=40, help="turns of each (default 40)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a turn's length, at least three steps (default 5)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads a process (default: usable cores)")
    parser.add_argument("overrides", nargs="*", default=[], help="overrides of the train command")
    arguments = parser.parse_args()
    words = [
        f"model={arguments.model}", "engine=native", "launch.device=cpu", "train.global_batch_size=8",
        "train.micro_batch_size=4", "train.seq_len=256", "optim.schedule=constant", "checkpoint.every=0",
        "train.eval_every=0", "tracking=none", *arguments.overrides, f"train.steps={ENDLESS}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="megatrain-revisions-") as folder:
        try:
            job = prepare(Path(folder), words, "cpu")
        except TurnFailed as error:
            print(f"revisions.py: {error}", file=sys.stderr)
            return 2
        try:
            times = take_turns(arguments, job["words"], Path(folder))
        except TurnFailed as error:
            print(f"revisions.py: {error}", file=sys.stderr)
            return 1
    for name in ("old", "new"):
        print(f"{name}: {1e3 * statistics.median(times[name]):.1f} ms a step ({getattr(arguments, name)})")
    ratio = median_interval([new / old for old, new in zip(times["old"], times["new"], strict=True)])
    print(f"new / old: {ratio}, {ratio.num_values} turns each")
    return 0


def take_turns(arguments: argparse.Namespace, words: list[str], folder: Path) -> dict[str, list[float]]:
    """Return each turn's median step time in seconds, by checkout.

    Raises:
        TurnFailed: a job ended, was too slow to start, or finished too few steps in a turn.
    """
    jobs: dict[str, Job] = {}
    try:
        for name in ("old", "new"):
            jobs[name] = Job(
                getattr(arguments, name).resolve(), [*words, f"run.name={name}"], folder, arguments.threads
            )
            jobs[name].warm_up()
        times: dict[str, list[float]] = {"old": [], "new": []}
        for turn in range(arguments.turns):
            for name in ("old", "new") if turn % 2 == 0 else ("new", "old"):
                times[name].append(jobs[name].turn(arguments.seconds))
        return times
    finally:
        for job in jobs.values():
            job.signal(signal.SIGKILL)
            job.process.wait()


class Job:
    """A `megatrain train` of one checkout, stopped except in its turns."""

    def __init__(self, checkout: Path, words: list[str], folder: Path, threads: int) -> None:
        if not (checkout / "megatrain" / "__main__.py").exists():
            raise TurnFailed(f"{checkout} is no checkout of megatrain")
        self.name = words[-1].partition("=")[2]
        self.metrics, self.errors = folder / "runs" / self.name / "metrics.jsonl", folder / f"{self.name}.stderr"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatrain", "train", *words],
                cwd=folder,
                env={**environ(threads, "cpu"), "PYTHONPATH": str(checkout)},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def warm_up(self) -> None:
        """Run the first five steps, then stop."""
        deadline = time.monotonic() + START_S
        while len(self._records()) < 5:
            self._check_alive()
            if time.monotonic() > deadline:
                raise TurnFailed(f"{self.name} finished fewer than five steps in {START_S} s")
            time.sleep(0.2)
        self.signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> float:
        """Run for some seconds; return the median time of the steps that began and ended in them."""
        before = len(self._records())
        self.signal(signal.SIGCONT)
        time.sleep(seconds)
        self.signal(signal.SIGSTOP)
        self._check_alive()
        whole = self._records()[before + 1 :]  # the first one was interrupted by the stop before
        if len(whole) < 2:
            raise TurnFailed(f"{self.name} finished {len(whole)} whole steps in {seconds:g} s; give more --seconds")
        return float(statistics.median(record["step_time_s"] for record in whole))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the agent and all its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.process.pid)
            for process in (agent, *agent.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _records(self) -> list[dict[str, Any]]:
        text = self.metrics.read_text() if self.metrics.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _check_alive(self) -> None:
        if self.process.poll() is not None:
            raise TurnFailed(f"{self.name} ended: {last_line(self.errors.read_text(errors='replace'))}")


if __name__ == "__main__":
    sys.exit(main())

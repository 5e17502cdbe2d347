"""The small training job of the other tests, submitted to the cluster, watched and waited for."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from support.cluster import wait_until
from support.commands import TRAIN, metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "train.sbatch"
JOB = [*TRAIN, "engine=native", "parallel.zero=1"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL")


class Job:
    """One job on two nodes, one rank on each, submitted unless a job number is given; its output is `<name>.out`."""

    def __init__(self, cluster, folder, name, *words, number=None, options=(), faults=None):
        self.cluster, self.folder, self.name = cluster, folder, name
        self.out = folder / f"{name}.out"
        environ = {"MEGATRAIN_PYTHON": sys.executable, **(faults or {})}
        command = ["sbatch", "--parsable", "--nodes=2", f"--output={self.out}", *options, str(SCRIPT)]
        overrides = [*JOB[1:], f"run.name={name}", *words]
        self.number = number or cluster.command(*command, *overrides, cwd=folder, **environ).strip()

    @property
    def state(self):
        return self.cluster.job(self.number)["JobState"]

    @property
    def log(self):
        return self.out.read_text() if self.out.exists() else ""

    @property
    def metrics(self):
        return metrics(self.folder, self.name)

    def wait_for_step(self, step, seconds=120):
        """Wait until the run has recorded this step."""
        wait_until(lambda: len(self.metrics) >= step, seconds, f"step {step} of {self.name}; {self.log}")

    def wait(self, seconds=150):
        """Wait until the job has ended without a requeue, and return its state."""
        deadline = time.monotonic() + seconds
        while (job := self.cluster.job(self.number))["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"{job['JobState']} after {seconds} s: {self.log}"
            time.sleep(0.2)
        return job["JobState"]

    def send(self, name):
        """Send a signal as Slurm does before the time limit (--signal=B:...)."""
        self.cluster.command("scancel", f"--signal={name}", "--batch", self.number)

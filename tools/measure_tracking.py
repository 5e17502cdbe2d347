"""What tracking costs a training step. `python tools/measure_tracking.py [seconds]` prints the figures of docs/tracking.md.

Steps of about 50 ms of NumPy work on one core are taken in turns with and without MLflow, each turn in a process of
its own so that nothing is warm, and the processor time of the helper process is counted apart.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatrain.config import TrackingConfig
from megatrain.tracking.base import RunInfo, Tracker, Trackers
from megatrain.tracking.journal import Journal
from megatrain.tracking.mlflow import MlflowTracker

RECORD = {
    **dict.fromkeys(("loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "data_time_s"), 1.5),
    "eval_time_s": 0.0,
    "save_time_s": 0.0,
    "updated": True,
    "mfu": None,
    "batch_hash": "0" * 16,
}


def backlog(folder: Path, num_steps: int) -> dict[str, float]:
    """The helper's own processor time for a run that has `num_steps` steps to send."""
    run_dir = folder / "run"
    run_dir.mkdir(parents=True)
    time_text = "2026-01-01T00:00:00.000Z"
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, num_steps + 1):
            file.write(json.dumps({"step": step, **RECORD, "tokens": 512 * step, "time": time_text}) + "\n")
    tracker = MlflowTracker(TrackingConfig(finish_timeout_s=300.0), run_dir)
    tracker.start(RunInfo("run", run_dir, {}, resumed_from_step=num_steps))
    tracker.finish("done")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"steps": num_steps, "helper_cpu": used.ru_utime + used.ru_stime}


def turn(kind: str, folder: Path, seconds: float) -> dict[str, float]:
    """Steps for `seconds`; times in seconds."""
    run_dir = folder / "run"
    trackers: list[Tracker] = [MlflowTracker(TrackingConfig(), run_dir)] if kind == "mlflow" else []
    journal = Journal(run_dir, Trackers(trackers))
    a = np.random.default_rng(1).standard_normal((700, 700)).astype(np.float32)
    begin = time.perf_counter()
    journal.start(RunInfo("run", run_dir, {"data": {"name": "none"}}), 0)
    started = time.perf_counter() - begin
    steps: list[float] = []
    noted: list[float] = []
    while time.perf_counter() - begin < seconds:
        before = time.perf_counter()
        for _ in range(5):
            a @ a
        middle = time.perf_counter()
        journal.step({"step": len(steps) + 1, **RECORD, "tokens": 512 * len(steps)})
        after = time.perf_counter()
        steps.append(after - before)
        noted.append(after - middle)
    begin = time.perf_counter()
    journal.finish("done", len(steps))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "steps": len(steps),
        "start": started,
        "step_mean": statistics.fmean(steps),
        "step_median": statistics.median(steps),
        "noted_median": statistics.median(noted),
        "finish": time.perf_counter() - begin,
        "helper_cpu": used.ru_utime + used.ru_stime,
        "helper_mb": used.ru_maxrss / 1024,
    }


def main() -> None:
    if len(sys.argv) == 4:
        kind, place, amount = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
        print(json.dumps(backlog(place, int(amount)) if kind == "backlog" else turn(kind, place, float(amount))))
        return
    seconds = sys.argv[1] if len(sys.argv) == 2 else "30"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for kind, amount in (("none", seconds), ("mlflow", seconds)) * 3 + (("backlog", "1"), ("backlog", "5001")):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, kind, folder, amount]
            answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        figures = json.loads(answer)
        print(kind, "  ".join(f"{name} {value:.6g}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()

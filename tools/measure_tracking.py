"""Measure what tracking costs a training step: the figures of docs/measurements/tracking.md.

`python tools/measure_tracking.py [seconds]`: run steps of about 50 ms of NumPy work on one core, alternately with
and without MLflow. Each turn is a new process, so nothing is warm. CPU time of the helper is counted separately.

`python tools/measure_tracking.py servers [pairs]`: run the same steps beside a helper whose server is dead, hangs or
answers 500. The steps run in pairs of adjacent blocks; the helper is stopped in one block of each pair, alternately the
first and the second.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from megatrain.config import TrackingConfig
from megatrain.tracking.journal import Journal
from megatrain.tracking.mlflow import MlflowTracker
from megatrain.tracking.tracker import RunInfo, Tracker, Trackers

RECORD = {
    **dict.fromkeys(("loss", "grad_norm", "lr", "tokens_per_s", "step_time_s", "data_time_s"), 1.5),
    "eval_time_s": 0.0,
    "save_time_s": 0.0,
    "updated": True,
    "mfu": None,
    "batch_hash": "0" * 16,
}


def backlog(folder: Path, num_steps: int) -> dict[str, float]:
    """Return the helper's own processor time for a run that has `num_steps` steps to send."""
    run_dir = folder / "run"
    run_dir.mkdir(parents=True)
    time_text = "2026-01-01T00:00:00.000Z"
    with open(run_dir / "metrics.jsonl", "w") as file:
        for step in range(1, num_steps + 1):
            file.write(json.dumps({"step": step, **RECORD, "tokens": 512 * step, "time": time_text}) + "\n")
    tracker = MlflowTracker(TrackingConfig(finish_timeout_s=300.0), run_dir, "megatrain.training.mlflow_helper")
    tracker.start(RunInfo("run", run_dir, {}, resumed_from_step=num_steps))
    tracker.finish("done")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"steps": num_steps, "helper_cpu": used.ru_utime + used.ru_stime}


def turn(kind: str, folder: Path, seconds: float) -> dict[str, float]:
    """Run steps for `seconds` and return their times in seconds."""
    run_dir = folder / "run"
    trackers: list[Tracker] = (
        [MlflowTracker(TrackingConfig(), run_dir, "megatrain.training.mlflow_helper")] if kind == "mlflow" else []
    )
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


ANSWERS_500 = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(500)
    do_POST = do_GET
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
SETTLE_S = 40.0
"""What the helper has for its imports and its first, quick attempts, before anything is measured."""
BLOCK_S = 1.5


@contextlib.contextmanager
def server(kind: str) -> Iterator[int]:
    """Yield the port of a server that is `dead`, `hung` (connects, never answers) or answers `errors`."""
    if kind == "errors":
        command = [sys.executable, "-c", ANSWERS_500]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield int(process.stdout.readline())
            process.kill()
        return
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listening:
        port = int(listening.getsockname()[1])
        if kind == "hung":
            yield port
            return
    yield port


def beside(folder: Path, pairs: int) -> dict[str, float]:
    """Return step times with the helper running over those with it stopped, and its CPU time as a share of a core."""
    run_dir = folder / "run"
    tracker = MlflowTracker(TrackingConfig(finish_timeout_s=5.0), run_dir, "megatrain.training.mlflow_helper")
    journal = Journal(run_dir, Trackers([tracker]))
    a = np.random.default_rng(1).standard_normal((700, 700)).astype(np.float32)
    journal.start(RunInfo("run", run_dir, {"data": {"name": "none"}}), 0)
    (helper,) = psutil.Process().children()
    num_steps = 0

    def block(seconds: float) -> float:
        nonlocal num_steps
        begin, steps = time.perf_counter(), 0
        while (taken := time.perf_counter() - begin) < seconds or not steps:
            for _ in range(5):
                a @ a
            steps, num_steps = steps + 1, num_steps + 1
            journal.step({"step": num_steps, **RECORD, "tokens": 512 * num_steps})
        return taken / steps

    def stopped(seconds: float) -> float:
        helper.send_signal(signal.SIGSTOP)
        try:
            return block(seconds)
        finally:
            helper.send_signal(signal.SIGCONT)

    block(SETTLE_S)
    begin, before = time.perf_counter(), helper.cpu_times()
    ratios, base = [], []
    for number in range(pairs):
        if number % 2:
            alone, with_it = stopped(BLOCK_S), block(BLOCK_S)
        else:
            with_it, alone = block(BLOCK_S), stopped(BLOCK_S)
        ratios.append(with_it / alone)
        base.append(alone)
    after, at_work = helper.cpu_times(), (time.perf_counter() - begin) / 2
    used = after.user + after.system - before.user - before.system
    low, middle, high = statistics.quantiles(ratios, n=4)
    journal.finish("done", num_steps)
    return {
        "pairs": pairs,
        "step_mean": statistics.median(base),
        "ratio_median": middle,
        "ratio_quartile_1": low,
        "ratio_quartile_3": high,
        "helper_share_of_a_core": used / at_work,
    }


def measure_servers(pairs: str) -> None:
    for kind in ("dead", "hung", "errors"):
        with server(kind) as port, tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
            command = [sys.executable, __file__, "beside", folder, pairs]
            answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        show(kind, json.loads(answer))


def show(kind: str, figures: dict[str, float]) -> None:
    print(kind, "  ".join(f"{name} {value:.6g}" for name, value in figures.items()), flush=True)


def main() -> None:
    if len(sys.argv) == 4:
        kind, place, amount = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
        if kind == "beside":
            figures = beside(place, int(amount))
        else:
            figures = backlog(place, int(amount)) if kind == "backlog" else turn(kind, place, float(amount))
        print(json.dumps(figures))
        return
    if sys.argv[1:2] == ["servers"]:
        measure_servers(sys.argv[2] if len(sys.argv) == 3 else "40")
        return
    seconds = sys.argv[1] if len(sys.argv) == 2 else "30"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for kind, amount in (("none", seconds), ("mlflow", seconds)) * 3 + (("backlog", "1"), ("backlog", "5001")):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, kind, folder, amount]
            answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        show(kind, json.loads(answer))


if __name__ == "__main__":
    main()

"""MLflow in the training process: start a helper process and log its messages. Imports no mlflow.

The helper (mlflow_sender.py) does all communication with MLflow. It is a process and not a thread, because importing
mlflow and sending a batch hold the GIL for milliseconds to seconds. metrics.jsonl is the queue between the two: a step
costs the trainer nothing, memory is bounded, and the next start sends what a server missed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from megatrain.config import TrackingConfig
from megatrain.distributed.python_process import python_command
from megatrain.resilience.signals import STOP_SIGNALS
from megatrain.resilience.terminal import show
from megatrain.tracking.tracker import RunInfo

PATIENCE_S = 1.0
"""Seconds that `finish` waits before it prints that it is waiting."""


def tracking_uri(runs_dir: Path) -> str:
    """Return where the runs in `runs_dir` are tracked: MLFLOW_TRACKING_URI, else `<runs_dir>/mlflow.db`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """Return `uri` without its user name and password."""
    return re.sub(r"(?<!/)//[^/\s]*@", "//", uri)


class MlflowTracker:
    """Tracks the run in `run_dir` with MLflow. `metrics.jsonl` in that folder must be written by `MetricsLog`.

    Only `finish` waits for the server, for at most `tracking.finish_timeout_s`. Each fault is logged once.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, helper: str) -> None:
        """`helper` is the module that the helper process runs; it calls `mlflow_sender.main`."""
        self._module = helper
        self._config = config
        self._run_dir = run_dir.resolve()
        self._log = logging.getLogger("megatrain.tracking")
        self._helper: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._last_step = 0
        self._sent_step = 0
        self._finishing = False
        self._stopped = False  # by this process

    def start(self, info: RunInfo) -> None:
        """Start the helper and return at once. It imports mlflow, finds or creates the run and catches up."""
        log_path = self._run_dir / "logs" / "mlflow.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        # srun forwards a signal to every process of the step, but the trainer decides when the helper ends. A blocked
        # signal stays blocked in the new process, from its first instruction on.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with open(log_path, "ab") as log:
                self._helper = subprocess.Popen(
                    python_command(self._module),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the trainer, which then calls finish
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._listener = threading.Thread(target=self._listen, args=(self._helper.stdout,), daemon=True)
        self._listener.start()
        described = asdict(info) | {"run_dir": str(self._run_dir)}
        described["dataset"] = {
            name: value for name, value in info.dataset.items() if isinstance(value, (str, int, float, bool))
        }
        self._tell({"info": described, "settings": asdict(self._config), "parent": os.getpid()})

    def step(self, record: dict[str, Any]) -> None:
        """Remember the step's number. The helper reads the record from metrics.jsonl."""
        self._last_step = record["step"]

    def event(self, event: dict[str, Any]) -> None:
        """Do nothing: events.jsonl becomes an artifact at the end."""

    def finish(self, status: str) -> None:
        """Wait until everything is sent or the time limit is reached; warn about what was not sent."""
        if self._helper is None:
            return
        self._finishing = True
        self._tell({"finish": status})
        if self._helper.stdin is not None:
            with suppress(BrokenPipeError):  # the helper is gone, and a message to it was still in the buffer
                self._helper.stdin.close()
        limit = self._config.finish_timeout_s
        if not self._ends_within(min(limit, PATIENCE_S)):
            show(f"waiting for MLflow to receive the last records (at most {limit:g} s)")
            if not self._ends_within(limit - PATIENCE_S):
                self._stop()
                self._log.warning(
                    "MLflow did not answer in time, so its helper process was stopped after %g s; all records are in"
                    " %s. A larger tracking.finish_timeout_s waits longer",
                    limit,
                    self._run_dir / "metrics.jsonl",
                )
        if self._listener is not None:
            self._listener.join(1.0)
        if self._sent_step < self._last_step:
            self._log.warning(
                "MLflow did not receive steps %d to %d. They are in metrics.jsonl and will be sent when the run is"
                " started again; details are in %s",
                self._sent_step + 1,
                self._last_step,
                self._run_dir / "logs" / "mlflow.log",
            )
        elif self._helper.returncode != 0:
            self._log.warning(
                "MLflow has all steps, but its helper process ended before the artifacts were sent; details are in %s",
                self._run_dir / "logs" / "mlflow.log",
            )

    def progress(self, step: int, text: str) -> None:
        """Do nothing: MLflow shows finished evaluations and saves."""

    def abandon(self) -> None:
        """Kill the helper. The next start sends what it has not sent."""
        if self._helper is not None:
            self._stop()

    def _stop(self) -> None:
        assert self._helper is not None
        self._stopped = True
        self._helper.kill()
        self._helper.wait()

    def _ends_within(self, seconds: float) -> bool:
        assert self._helper is not None
        try:
            self._helper.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._helper is not None and self._helper.stdin is not None
        try:
            self._helper.stdin.write(json.dumps(message, default=str).encode() + b"\n")
            self._helper.stdin.flush()
        except (BrokenPipeError, ValueError):
            return  # the helper is gone; `_listen` warns about it

    def _listen(self, stdout: IO[bytes]) -> None:
        """Handle the helper's messages. Runs in its own thread."""
        finished = False
        for line in stdout:
            message = json.loads(line)
            self._sent_step = message.get("sent", self._sent_step)
            finished = finished or message.get("finished", False)
            if "warning" in message:
                self._log.warning("MLflow: %s", message["warning"])
            if "info" in message:
                self._log.info("MLflow: %s", message["info"])
        if not finished and not self._stopped:
            goes_on = "" if self._finishing else "training goes on, and "
            self._log.warning("MLflow's helper process is gone; %smetrics.jsonl has all records", goes_on)

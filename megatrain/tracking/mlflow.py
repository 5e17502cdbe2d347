"""The training process's side of MLflow: starts a helper process, and hears what it has to say. Imports no mlflow.

All that talks to MLflow lives in mlflow_sender.py, in a process of its own: importing mlflow and sending a batch hold
Python's interpreter lock for milliseconds to seconds, which a thread beside the training loop would take from it.
metrics.jsonl is the queue between the two, so a step costs the trainer nothing, memory is bounded by construction, and
whatever a dead server missed is still there at the next start.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from megatrain.config import TrackingConfig
from megatrain.tracking.tracker import RunInfo

PATIENCE_S = 1.0
"""How long the end waits for MLflow without saying so."""


def tracking_uri(runs_dir: Path) -> str:
    """Where runs of `runs_dir` are tracked: MLFLOW_TRACKING_URI, else the embedded store `<runs_dir>/mlflow.db`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """`uri` without the user and password that it may carry."""
    return re.sub(r"//[^/@]*@", "//", uri)


class MlflowTracker:
    """Tracks the run in `run_dir` with MLflow. `metrics.jsonl` in that folder must be written by `MetricsLog`.

    Nothing here waits for the server but `finish`, for at most `tracking.finish_timeout_s`. What goes wrong is
    logged as a warning, once per fault.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, helper: str) -> None:
        """`helper` names the module that the helper process runs: it calls `mlflow_sender.main`."""
        self._module = helper
        self._config = config
        self._run_dir = run_dir.resolve()
        self._log = logging.getLogger("megatrain.tracking")
        self._helper: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None
        self._last_step = 0
        self._sent_step = 0
        self._abandoned = False

    def start(self, info: RunInfo) -> None:
        """Starts the helper and returns; the helper imports mlflow, finds or makes the run and catches up."""
        log_path = self._run_dir / "logs" / "mlflow.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path, "ab") as log:
            self._helper = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the trainer, which then calls finish
            )
        self._listener = threading.Thread(target=self._listen, args=(self._helper.stdout,), daemon=True)
        self._listener.start()
        described = asdict(info) | {"run_dir": str(self._run_dir)}
        described["dataset"] = {
            name: value for name, value in info.dataset.items() if isinstance(value, (str, int, float, bool))
        }
        self._tell({"info": described, "settings": asdict(self._config), "parent": os.getpid()})

    def step(self, record: dict[str, Any]) -> None:
        """Notes how far the run is: the helper reads the record itself from metrics.jsonl."""
        self._last_step = record["step"]

    def event(self, event: dict[str, Any]) -> None:
        """Nothing at once: events.jsonl becomes an artifact at the end."""

    def finish(self, status: str) -> None:
        """Waits until everything is sent, or until time is up; says what was not sent."""
        if self._helper is None:
            return
        self._tell({"finish": status})
        if self._helper.stdin is not None and not self._helper.stdin.closed:
            self._helper.stdin.close()
        limit = self._config.finish_timeout_s
        if not self._ends_within(min(limit, PATIENCE_S)):
            print(f"waiting for MLflow to take the last records (at most {limit:g} s)", file=sys.stderr, flush=True)
            if not self._ends_within(limit - PATIENCE_S):
                self._helper.kill()
                self._helper.wait()
        if self._listener is not None:
            self._listener.join(1.0)
        if self._sent_step < self._last_step:
            self._log.warning(
                "MLflow has not got steps %d to %d. They are in metrics.jsonl and will be sent when the run is started"
                " again; details are in %s",
                self._sent_step + 1,
                self._last_step,
                self._run_dir / "logs" / "mlflow.log",
            )
        elif self._helper.returncode != 0:
            self._log.warning(
                "MLflow has all steps, but its helper was stopped after %g s, before the artifacts were sent",
                self._config.finish_timeout_s,
            )

    def abandon(self) -> None:
        """Ends the helper; what it has not sent yet, the next start's sends."""
        if self._helper is not None:
            self._abandoned = True
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
            return  # the helper is gone, which `_listen` has said

    def _listen(self, stdout: IO[bytes]) -> None:
        """Runs in a thread that sleeps until the helper speaks."""
        finished = False
        for line in stdout:
            message = json.loads(line)
            self._sent_step = message.get("sent", self._sent_step)
            finished = finished or message.get("finished", False)
            if "warning" in message:
                self._log.warning("MLflow: %s", message["warning"])
            if "info" in message:
                self._log.info("MLflow: %s", message["info"])
        if not finished and not self._abandoned:
            self._log.warning("MLflow's helper process is gone; training goes on, metrics.jsonl has it all")

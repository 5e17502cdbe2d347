"""MLflow's helper process: follow a run's metrics.jsonl and send what the server lacks. Imports no torch.

mlflow.py starts this process and sends it messages; mlflow_run.py finds or creates the run on the server. If the
server is down, the helper retries later. If the trainer dies, the helper sends the remaining records, marks the run
as failed and exits.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import select
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, TextIO, cast

from megatrain.resilience.failure import seconds_of
from megatrain.resilience.terminal import Terminal
from megatrain.tracking.mlflow import tracking_uri, without_password
from megatrain.tracking.mlflow_models import register_model
from megatrain.tracking.mlflow_run import MAX_PARAM_LENGTH, ServerRun
from megatrain.tracking.mlflow_store import plain
from megatrain.tracking.restarts import Restart, Restarts
from megatrain.tracking.system_metrics import SystemMetrics

MAX_METRICS = 1000
"""MLflow's limit per request."""
MAX_SYSTEM_SAMPLES = 1000
"""Samples kept while the server is down. Older ones are dropped and counted."""
FORBIDDEN = re.compile(r"[^/\w.\- ]")
"""A character that no metric's name may have."""
MAX_READ = 1 << 20
"""Bytes of metrics.jsonl held in memory at once."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0
ORPHAN_TIMEOUT_S = 10.0
"""Seconds for sending the remaining records after the trainer died."""
PROGRESS = "progress/step"
"""The metric whose latest value is the last step that the server has."""
RESTARTS = "restarts"
"""The metric that counts the run's restarts, at the steps where the run continued."""
RESTART_TAG = "restart_{}"
"""The tag that holds the reason for a restart."""
STATUS = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def main(write_report: Callable[[Path, Path], Path], describe_model: Callable[[Path], dict[str, Any]]) -> None:
    """Read the setup from standard input, then serve until the trainer finishes or dies."""
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to the log, not among the messages
    Terminal.install().keep_going()  # a full disk under the log must not stop it
    os.nice(5)  # training has priority
    sys.stdout, sys.stderr = (cast(TextIO, WithoutPasswords(stream)) for stream in (sys.stdout, sys.stderr))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    parent = Parent(sys.stdin.fileno(), messages)
    setup = parent.read(timeout=None)
    if setup is not None:
        Sender(setup, parent, write_report, describe_model).serve()
    parent.tell(finished=True)


class WithoutPasswords:
    """Text stream that removes user names and passwords of addresses, which mlflow's messages and stack traces have."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, such as a whole log record."""
        return self._stream.write(without_password(text))

    def __getattr__(self, name: str) -> Any:
        """Return what the stream itself has."""
        return getattr(self._stream, name)


class Parent:
    """The connection to the trainer: lines of JSON in both directions, and whether it is still alive."""

    def __init__(self, fd: int, messages: IO[str]) -> None:
        self._fd, self._messages, self._buffer = fd, messages, b""
        self._pid = os.getppid()
        self.gone = False

    def read(self, timeout: float | None) -> dict[str, Any] | None:
        """Return the next message; None after `timeout` seconds or when the trainer is gone.

        The trainer's child processes may keep the pipe open, so a new parent process id also means that it died.
        """
        while b"\n" not in self._buffer and not self.gone:
            if not select.select([self._fd], [], [], timeout)[0]:
                self.gone = os.getppid() != self._pid
                return None
            data = os.read(self._fd, 1 << 16)
            self._buffer += data
            self.gone = not data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line) if line else None

    def tell(self, **message: Any) -> None:
        """Send a message to the trainer."""
        try:
            self._messages.write(json.dumps(message) + "\n")
        except OSError:
            self.gone = True


class Sender:
    """Sends one run to the server.

    Every method may raise any MLflow error. All are idempotent: work already done is found on the server and skipped.
    After an error everything is looked up again, because a run or its experiment may have been deleted in between.
    """

    def __init__(
        self,
        setup: dict[str, Any],
        parent: Parent,
        write_report: Callable[[Path, Path], Path],
        describe_model: Callable[[Path], dict[str, Any]] = lambda run_dir: {},
    ) -> None:
        """`write_report(run_dir, out)` writes the report, which becomes an artifact, and returns its path.

        `describe_model(run_dir)` returns what the model registry gets as tags; empty if the run has no checkpoint.
        """
        self.info, self.settings, self.parent = setup["info"], setup["settings"], parent
        self.write_report, self.describe_model = write_report, describe_model
        self.run = ServerRun(self.info, self.settings, parent.tell)
        self.run_dir = self.run.run_dir
        self.metrics_path = self.run_dir / "metrics.jsonl"
        self.run_id: str | None = None
        self.sent_step = 0
        self._offset = 0
        self._start_s = 0.0
        self._samples: deque[tuple[float, dict[str, float]]] = deque(maxlen=MAX_SYSTEM_SAMPLES)
        self._dropped = 0
        self._restarts = Restarts(self.run_dir / "events.jsonl")
        self._unsent_restarts: list[Restart] = []
        self._known_tags: dict[str, str] = {}
        self._system = SystemMetrics(setup["parent"], self.run_dir)
        self._next_sample = time.monotonic()
        self._next_try, self._backoff, self._failing = 0.0, FIRST_BACKOFF_S, False

    # ------------------------------------------------------------------------------------------------ the loop

    def serve(self) -> None:
        """Connect, then send every `flush_every_s` seconds until the trainer reports its end or dies."""
        message = None
        while message is None and not self.parent.gone:
            self._try(self.catch_up)
            self._sample()
            message = self.parent.read(timeout=self._pause())
        status = message["finish"] if message is not None else "failed"
        limit = self.settings["finish_timeout_s"] - 1.0 if message is not None else ORPHAN_TIMEOUT_S
        deadline = time.monotonic() + limit
        self._next_try, self._backoff = 0.0, FIRST_BACKOFF_S
        while not self._try(lambda: self.finish(status)) and time.monotonic() < deadline:
            time.sleep(0.2)

    def _pause(self) -> float:
        due: list[float] = [self.settings["flush_every_s"]]
        if self.settings["system_metrics_every_s"]:
            due.append(self._next_sample - time.monotonic())
        return max(0.01, min(due))

    def _try(self, action: Callable[[], None]) -> bool:
        """Run `action` unless in backoff; return whether it succeeded. Warn only about the first failure in a row."""
        if time.monotonic() < self._next_try:
            return False
        try:
            action()
        except Exception as error:
            logging.getLogger("megatrain.tracking").exception("attempt failed")
            self.run_id = None
            if not self._failing:
                where = without_password(tracking_uri(self.run_dir.parent))
                reason = plain(str(error)) or type(error).__name__
                self.parent.tell(warning=f"{where} cannot be used now, training goes on: {reason}")
            self._failing = True
            self._next_try = time.monotonic() + self._backoff
            self._backoff = min(2 * self._backoff, MAX_BACKOFF_S)
            return False
        if self._failing:
            self.parent.tell(info=f"in use again, has all up to step {self.sent_step}")
        if self._dropped:
            self.parent.tell(warning=f"{self._dropped} samples of system metrics did not fit and are lost")
            self._dropped = 0
        self._failing, self._backoff = False, FIRST_BACKOFF_S
        return True

    def _sample(self) -> None:
        every = self.settings["system_metrics_every_s"]
        if every and time.monotonic() >= self._next_sample:
            self._next_sample = time.monotonic() + every
            self._dropped += len(self._samples) == MAX_SYSTEM_SAMPLES
            self._samples.append((time.time(), self._system.sample()))

    # ------------------------------------------------------------------------------------------------ the run

    def catch_up(self) -> None:
        """Connect if necessary, then send all that the server lacks."""
        if self.run_id is None:
            self.connect()
        self.send()

    def connect(self) -> None:
        """Connect to the run on the server and find out what it has."""
        run = self.run.connect()
        self.client = self.run.client
        self._start_s = run.info.start_time / 1000
        self.sent_step = int(run.data.metrics.get(PROGRESS, 0))
        self._offset = 0
        self._restarts, self._unsent_restarts = Restarts(self.run_dir / "events.jsonl"), []
        self._known_tags = run.data.tags
        self.run_id = run.info.run_id
        self.parent.tell(sent=self.sent_step)

    # ------------------------------------------------------------------------------------------------ metrics

    def send(self) -> None:
        """Send the steps and system samples that the server lacks, oldest first.

        No step is sent twice: a step repeated after a resume has another time, and MLflow would keep both values.
        Each request carries whole steps and ends with PROGRESS, the number of the last one.
        """
        assert self.run_id is not None
        for metrics, step, offset in self._unsent_steps():
            if metrics:
                self.client.log_batch(self.run_id, metrics=metrics)
                self.sent_step = step
                self.parent.tell(sent=step)
            self._offset = offset
        self._send_restarts()
        while self._samples:
            self.client.log_batch(self.run_id, metrics=self._system_points(*self._samples[0]))
            self._samples.popleft()

    def _send_restarts(self) -> None:
        """Send each new restart once: a point of the metric RESTARTS and a tag, in one request."""
        from mlflow.entities import Metric, RunTag

        self._unsent_restarts += self._restarts.read()
        while self._unsent_restarts:
            one = self._unsent_restarts[0]
            name, moment = RESTART_TAG.format(one.number), milliseconds(one.time)
            told = f"{one.why} ({one.time})"[:MAX_PARAM_LENGTH]
            if self._known_tags.get(name) != told:
                point = Metric(RESTARTS, one.number, moment, one.step)
                self.client.log_batch(self.run_id, metrics=[point], tags=[RunTag(name, told)])
            self._unsent_restarts.pop(0)

    def _unsent_steps(self) -> Iterator[tuple[list[Any], int, int]]:
        """Yield batches of metrics, each with its last step and the end offset of that step in the file."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        step, offset = self.sent_step, self._offset
        for record, end in self._records():
            if record["step"] > step:
                moment = milliseconds(record["time"])
                points = [Metric(name, value, moment, record["step"]) for name, value in numbers(record).items()]
                if len(metrics) + len(points) + 1 > MAX_METRICS:
                    yield [*metrics, Metric(PROGRESS, step, moment, step)], step, offset
                    metrics = []
                metrics += points
                step = record["step"]
                last = moment
            offset = end
        if metrics:
            metrics.append(Metric(PROGRESS, step, last, step))
        yield metrics, step, offset

    def _records(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the complete lines after `_offset` and their end offsets. Starts over if the file was cut."""
        if not self.metrics_path.exists():
            return
        with open(self.metrics_path, "rb") as file:
            if self._offset and self._is_cut(file):
                self._offset = 0
            file.seek(self._offset)
            end = self._offset
            while data := file.readlines(MAX_READ):
                for line in data:
                    if not line.endswith(b"\n"):
                        return
                    end += len(line)
                    yield json.loads(line), end

    def _is_cut(self, file: IO[bytes]) -> bool:
        """Return whether the file was cut: `_offset` no longer follows the last step sent."""
        if self._offset > os.fstat(file.fileno()).st_size:
            return True
        file.seek(self._offset - 1)
        if file.read(1) != b"\n":
            return True
        line = file.readline()
        return line.endswith(b"\n") and json.loads(line)["step"] > self.sent_step + 1

    def _system_points(self, moment: float, values: dict[str, float]) -> list[Any]:
        """Return a sample as points. Their step is the seconds since the MLflow run first started."""
        from mlflow.entities import Metric

        step = round(moment - self._start_s)
        return [Metric(name, value, round(moment * 1000), step) for name, value in values.items()]

    def finish(self, status: str) -> None:
        """Send the remaining records, the events and the report, and end the run on the server."""
        self.catch_up()
        run_id = self.run_id
        assert run_id is not None
        self.run.log_files(run_id, "config.yaml", "events.jsonl")
        self.client.set_terminated(run_id, STATUS[status])
        with tempfile.TemporaryDirectory() as folder:  # last, as it takes half a minute for a million steps
            report = self.write_report(self.run_dir, Path(folder) / "report.html")
            self.run.extra(run_id, "files", partial(self.client.log_artifact, run_id, str(report)))
        if self.settings.get("register") and status == "done" and (tags := self.describe_model(self.run_dir)):
            name = str(self.info["run_name"])
            self.run.extra(run_id, "model", partial(register_model, self.client, run_id, name, tags))


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return a step's finite numbers to plot, without the step itself, times of 0 and `updated` if it is true.

    What MLflow allows in no metric's name, such as the `+` of a dataset's name, becomes `_`.
    """
    return {
        FORBIDDEN.sub("_", name): float(value)
        for name, value in record.items()
        if isinstance(value, (int, float))
        and math.isfinite(value)
        and name != "step"
        and not (name in ("eval_time_s", "save_time_s") and value == 0)
        and not (name == "updated" and value)
    }


def milliseconds(time_text: str) -> int:
    """Convert an ISO 8601 time, as in metrics.jsonl, to milliseconds since the Unix epoch."""
    return round(seconds_of(time_text) * 1000)

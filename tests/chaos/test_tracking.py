"""The MLflow server fails in every way while a real job trains: nothing waits for it, and it gets every record once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.commands import TWO_NATIVE, events, final_files, metrics, same
from support.faults import fault, injected
from support.tracking_servers import Answers500, Hung, MlflowServer, free_port

LIMIT_S = 120
"""For each thing waited for; the machine may be busy."""


@pytest.fixture
def server(tmp_path):
    running = MlflowServer(tmp_path, free_port())
    yield running
    running.kill()


class Job:
    """A training job of two ranks, tracked at `uri`, that pauses at the beginning of each step of `stops`."""

    def __init__(self, folder, name, uri, stops, faults):
        self.folder, self.name = folder, name
        gates = [fault(0, step, "forward", "wait", by=f"go_{step}") for step in stops]
        quick = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        environ = {**os.environ, **injected(folder, name, gates + faults), "MLFLOW_TRACKING_URI": uri, **quick}
        words = [word for word in TWO_NATIVE if word != "tracking=none"]
        words += ["tracking.flush_every_s=0.2", "tracking.finish_timeout_s=120"]
        self.output = open(folder / f"{name}.txt", "w+")  # noqa: SIM115 (a pipe would fill up)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatrain", *words, f"run.name={name}"],
            cwd=folder, env=environ, stdout=self.output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def said(self):
        return (self.folder / f"{self.name}.txt").read_text()

    def log(self):
        """Return the helper process's log."""
        path = self.folder / "runs" / self.name / "logs" / "mlflow.log"
        return path.read_text() if path.exists() else ""

    def wait_until(self, true):
        deadline = time.monotonic() + LIMIT_S
        while not true():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said() + self.log()
            time.sleep(0.05)

    def wait_at(self, step):
        self.wait_until(lambda: (self.folder / f"faults_{self.name}" / f"go_{step}.waits").exists())

    def go(self, step):
        (self.folder / f"faults_{self.name}" / f"go_{step}").touch()

    def mlflow_run(self, mlflow):
        """Return the job's run on the server, None before it exists. The server must answer."""
        path = self.folder / "runs" / self.name / "mlflow.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        return mlflow.get_run(next(iter(known.values()))["run_id"]) if known else None

    def sent(self, mlflow):
        """Return the last step that the server has."""
        run = self.mlflow_run(mlflow)
        return run.data.metrics.get("progress/step", 0) if run else 0


def test_a_server_that_fails_in_every_way_disturbs_nothing_and_gets_every_record_once(
    workplace, undisturbed_native, server
):
    """The server is killed, hangs, answers 500, comes back and pauses, each at its own step.

    A rank is killed while the server is down and again after it came back, so the server already has some repeated
    steps.
    """
    from mlflow.tracking import MlflowClient

    deaths = [fault(0, 28, "backward", "SIGKILL"), fault(1, 35, "backward", "SIGKILL")]
    job = Job(workplace, "tracked", server.uri, [7, 13, 19, 25, 31, 34], deaths)
    try:
        mlflow = MlflowClient(server.address())
        job.wait_at(7)
        job.wait_until(lambda: job.sent(mlflow) == 6)
        server.kill()
        job.go(7)
        job.wait_at(13)
        job.wait_until(lambda: "Connection refused" in job.log())
        hung = Hung(server.port)
        job.go(13)
        job.wait_at(19)
        job.wait_until(lambda: hung.requests and "Read timed out" in job.log())
        hung.close()
        broken = Answers500(server.port)
        job.go(19)
        job.wait_at(25)
        job.wait_until(lambda: broken.requests and "500 error responses" in job.log())
        broken.close()
        server.start()
        server.address()
        job.wait_until(lambda: job.sent(mlflow) == 24)  # by the helper that met all these faults
        server.signal(signal.SIGSTOP)
        so_far = job.log().count("Read timed out")
        job.go(25)
        job.wait_at(31)  # on the way rank 0 is killed, and all ranks restart
        job.wait_until(lambda: job.log().count("Read timed out") > so_far)
        server.signal(signal.SIGCONT)
        job.go(31)
        job.wait_at(34)
        job.wait_until(lambda: job.sent(mlflow) == 33)
        job.go(34)  # then rank 1 is killed; the server already has some repeated steps
        assert job.process.wait(LIMIT_S) == 0, job.said()
    finally:
        job.process.kill()
        job.process.wait()
    records = metrics(workplace, "tracked")
    same(records, undisturbed_native)
    assert final_files(workplace, "tracked") == final_files(workplace, "undisturbed-native")
    assert job.said().count("cannot be used now, training goes on") >= 1

    run = job.mlflow_run(mlflow)
    (found,) = mlflow.search_runs([run.info.experiment_id])
    assert found.info.run_id == run.info.run_id and run.info.status == "FINISHED"
    for name in ("loss", "grad_norm", "lr", "tokens", "step_time_s"):
        points = mlflow.get_metric_history(run.info.run_id, name)
        assert [point.step for point in points] == list(range(1, 41)), name
        assert [point.timestamp for point in points] == sorted(point.timestamp for point in points), name
    loss = mlflow.get_metric_history(run.info.run_id, "loss")
    assert [point.value for point in loss] == [record["loss"] for record in undisturbed_native]
    held_out = {point.step: point.value for point in mlflow.get_metric_history(run.info.run_id, "heldout_loss")}
    assert held_out == {r["step"]: r["heldout_loss"] for r in undisturbed_native if "heldout_loss" in r} and held_out
    progress = [point.step for point in mlflow.get_metric_history(run.info.run_id, "progress/step")]
    assert progress == sorted(set(progress)) and progress[-1] == 40

    resumes = [event["step"] for event in events(workplace, "tracked", "resume")]
    restarts = mlflow.get_metric_history(run.info.run_id, "restarts")
    assert [(point.value, point.step) for point in restarts] == list(enumerate(resumes, start=1)) and len(resumes) == 2
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("restart_")}
    assert sorted(tags) == ["restart_1", "restart_2"]
    for tag, death, step in zip(sorted(tags), deaths, resumes, strict=True):
        assert tags[tag].startswith(f"SIGKILL of rank {death['rank']} on ")
        assert f" at step {death['step']}; from step {step} (" in tags[tag]
    assert resumes[1] < 33, "the job repeated steps that the server already had"

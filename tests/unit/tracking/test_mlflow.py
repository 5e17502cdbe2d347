"""MLflow from the trainer's side: real helper processes against the embedded store, a real server, a hung and a dead
one."""

import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tracking_servers import MlflowServer, free_port

from megatrain.config import TrackingConfig
from megatrain.tracking.events import EventLog
from megatrain.tracking.metrics import MetricsLog, read_metrics
from megatrain.tracking.mlflow import MlflowTracker, tracking_uri, without_password
from megatrain.tracking.mlflow_sender import milliseconds
from megatrain.tracking.mlflow_store import store_problem
from megatrain.tracking.tracker import RunInfo

FINGERPRINT = "0123456789abcdef" * 4


@pytest.fixture(autouse=True, scope="module")
def embedded():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


def info(run_dir, first=1, lr=1e-3):
    config = {
        "optim": {"lr": lr},
        "data": {"name": "books", "dir": "data", "paths": ["x" * 600]},
        "engine": {"name": "native"},
        "tracking": {"name": "mlflow"},
    }
    return RunInfo(
        run_name=run_dir.name,
        run_dir=run_dir,
        config=config,
        resumed_from_step=first - 1 or None,
        num_parameters=1000,
        world_size=2,
        layout="dp=2 zero=3",
        dataset={"documents": 7, "blocks": ["..."]},
        dataset_fingerprint=FINGERPRINT,
        git_commit="abc123",
        host="node-1",
    )


class Training:
    """A run as the trainer makes it: it cuts the log, starts the tracker, writes steps and notifies the tracker."""

    def __init__(self, run_dir, first=1, lr=1e-3, **settings):
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text("a: 1\n")
        self.run_dir, self.next = run_dir, first
        self.log = MetricsLog(run_dir / "metrics.jsonl")
        self.log.resume(first - 1)
        self.events = EventLog(run_dir / "events.jsonl")
        self.events.emit("start" if first == 1 else "resume", first - 1)
        defaults = {"flush_every_s": 0.2, "system_metrics_every_s": 0.5, "finish_timeout_s": 60.0}
        self.tracker = MlflowTracker(
            TrackingConfig(**{**defaults, **settings}), run_dir, "megatrain.training.mlflow_helper"
        )
        self.tracker.start(info(run_dir, first, lr))

    def steps(self, count):
        for step in range(self.next, self.next + count):
            record = {"step": step, "loss": 1 / step + self.next, "tokens": step * 64, "updated": step != 3}
            record |= {"eval_time_s": 0.0, "batch_hash": "00", "mfu": None} | (
                {"heldout_loss": 2.0} if step == 5 else {}
            )
            self.tracker.step(self.log.append(record))
        self.next += count
        return self

    def finish(self, status="done"):
        self.tracker.finish(status)
        self.log.close()


def client(uri):
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def run_id_of(run_dir, server="embedded"):
    return json.loads((run_dir / "mlflow.json").read_text())[server]["run_id"]


def points(mlflow, run_id, name):
    return [(point.step, point.value, point.timestamp) for point in mlflow.get_metric_history(run_id, name)]


@pytest.fixture(autouse=True, scope="module")
def server(tmp_path_factory):
    """Start a real `mlflow server` while other tests run; return a function that waits for its address."""
    running = MlflowServer(tmp_path_factory.mktemp("server"), free_port())
    yield running.address
    running.kill()


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Two runs begin at the same moment on a store that does not exist yet; then one of them goes back five steps and
    continues with another learning rate. The trainer of a third run was killed before its helper had connected."""
    runs = tmp_path_factory.mktemp("runs")
    code = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}\n"
        "from pathlib import Path; from test_mlflow import Training\n"
        "Training(Path(sys.argv[1])).steps(12); print('ready', flush=True); import time; time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(runs / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout.readline() == b"ready\n"
        trainer.send_signal(signal.SIGKILL)
    both = [Training(runs / "one"), Training(runs / "two")]
    for training in both:
        training.steps(20)
    for training in both:
        training.finish("stopped")
    mlflow = client(tracking_uri(runs))
    first = {name: points(mlflow, run_id_of(runs / name), "loss") for name in ("one", "two")}
    Training(runs / "one", first=16, lr=5e-4).steps(15).finish("done")
    return runs, mlflow, first


def test_two_runs_that_begin_at_once_share_one_new_store(story):
    runs, mlflow, first = story
    assert [step for step, _, _ in first["one"]] == [step for step, _, _ in first["two"]] == list(range(1, 21))
    one, two = (mlflow.get_run(run_id_of(runs / name)) for name in ("one", "two"))
    assert one.info.run_id != two.info.run_id and one.info.experiment_id == two.info.experiment_id
    assert (one.info.status, two.info.status, two.info.run_name) == ("FINISHED", "KILLED", "two")


def test_a_resumed_run_continues_without_duplicate_points(story):
    """Repeated steps keep the value and time of their first run; every other point equals metrics.jsonl."""
    runs, mlflow, first = story
    loss = points(mlflow, run_id_of(runs / "one"), "loss")
    assert [step for step, _, _ in loss] == list(range(1, 31))
    assert loss[:20] == first["one"]
    written = read_metrics(runs / "one" / "metrics.jsonl")
    assert loss[20:] == [(r["step"], r["loss"], milliseconds(r["time"])) for r in written[20:]]


def test_no_metric_has_two_points_at_a_step(story):
    runs, mlflow, _ = story
    run_id = run_id_of(runs / "one")
    metrics = mlflow.get_run(run_id).data.metrics
    assert {"loss", "tokens", "heldout_loss", "updated", "system/cpu_utilization_percentage"} <= set(metrics)
    assert not {"batch_hash", "mfu", "eval_time_s", "step"} & set(metrics)
    for name in metrics:
        steps = [step for step, _, _ in points(mlflow, run_id, name)]
        assert len(steps) == len(set(steps)), name
    assert points(mlflow, run_id, "updated")[0][:2] == (3, 0.0)


def test_a_parameter_that_a_resume_changed_becomes_a_tag(story):
    runs, mlflow, _ = story
    run = mlflow.get_run(run_id_of(runs / "one"))
    assert (run.data.params["optim.lr"], run.data.tags["resume.optim.lr"]) == ("0.001", "0.0005")
    assert [name for name in run.data.tags if name.startswith("resume.")] == ["resume.optim.lr"]
    assert run.data.params["num_parameters"] == "1000" and run.data.params["engine.name"] == "native"
    assert len(run.data.params["data.paths"]) == 500 and run.data.params["data.paths"].endswith("x...")


def test_a_run_has_tags_a_dataset_and_artifacts(story):
    runs, mlflow, _ = story
    run = mlflow.get_run(run_id_of(runs / "one"))
    expected = {
        "git_commit": "abc123",
        "host": "node-1",
        "world_size": "2",
        "layout": "dp=2 zero=3",
        "engine": "native",
    }
    assert expected.items() <= run.data.tags.items()
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("books", FINGERPRINT[:36])
    assert json.loads(used.dataset.profile) == {"documents": 7, "fingerprint": FINGERPRINT}
    assert json.loads(used.dataset.source)["uri"].endswith("data/books")
    names = {item.path for item in mlflow.list_artifacts(run.info.run_id)}
    assert names == {"config.yaml", "events.jsonl", "report.html"}
    assert run.info.artifact_uri.startswith((runs / "mlartifacts").as_uri())


def test_the_records_of_a_killed_trainer_are_sent_and_the_run_is_marked_as_failed(story):
    runs, mlflow, _ = story
    run = None
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            run = mlflow.get_run(run_id_of(runs / "killed"))
            if run.info.status != "RUNNING":
                break
        time.sleep(0.2)
    assert run is not None and run.info.status == "FAILED"
    assert [step for step, _, _ in points(mlflow, run.info.run_id, "loss")] == list(range(1, 13))


def test_a_server_that_never_answers_delays_no_step(tmp_path, monkeypatch, caplog, capsys):
    """Starting and stepping never wait for the server; finishing waits a bounded time and names unsent steps."""
    waits, messages = [], []
    ends_within = MlflowTracker._ends_within
    monkeypatch.setattr(MlflowTracker, "_ends_within", lambda self, s: waits.append(s) or ends_within(self, s))
    tell = MlflowTracker._tell
    monkeypatch.setattr(MlflowTracker, "_tell", lambda self, message: messages.append(message) or tell(self, message))
    with socket.create_server(("127.0.0.1", 0)) as hung:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{hung.getsockname()[1]}")
        training = Training(tmp_path / "run", finish_timeout_s=1.5).steps(25)
        assert waits == [] and len(messages) == 1, "a step neither waits for the helper nor writes to it"
        with caplog.at_level(logging.WARNING):
            training.finish()
        assert waits == [1.0, 0.5] and messages[1:] == [{"finish": "done"}]
    assert capsys.readouterr().err.count("waiting for MLflow to receive the last records (at most 1.5 s)") == 1
    assert "MLflow did not receive steps 1 to 25. They are in metrics.jsonl" in caplog.text
    assert "helper process is gone" not in caplog.text, "it was stopped here"
    records = tmp_path / "run" / "metrics.jsonl"
    assert f"stopped after 1.5 s; all records are in {records}. A larger tracking.finish_timeout_s" in caplog.text


def test_records_that_a_dead_server_missed_are_sent_at_the_next_start(tmp_path, monkeypatch, server, caplog):
    """The server's user name and password are never written."""
    run_dir = tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{free_port()}")
    with caplog.at_level(logging.WARNING):
        training = Training(run_dir, finish_timeout_s=3.0).steps(10)
        deadline = time.monotonic() + 60
        while "cannot be used now" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.1)
        training.finish("stopped")
    assert caplog.text.count("cannot be used now, training goes on") == 1
    assert "MLflow did not receive steps 1 to 10" in caplog.text
    uri = server()
    assert store_problem(uri, "megatrain", 60.0) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("//", "//someone:secret@"))
    Training(run_dir, first=8).steps(6).finish()
    mlflow, run_id = client(uri), run_id_of(run_dir, uri)
    written = read_metrics(run_dir / "metrics.jsonl")
    assert points(mlflow, run_id, "loss") == [(r["step"], r["loss"], milliseconds(r["time"])) for r in written]
    assert len(written) == 13 and mlflow.get_run(run_id).info.status == "FINISHED"
    assert {item.path for item in mlflow.list_artifacts(run_id)} == {"config.yaml", "events.jsonl", "report.html"}
    log = (run_dir / "logs" / "mlflow.log").read_text()
    assert "attempt failed" in log, "mlflow's own messages are there"
    assert "secret" not in caplog.text + log + (run_dir / "mlflow.json").read_text()


def test_passwords_are_never_shown():
    assert without_password("https://me:pa:ss@host:5000/a") == "https://host:5000/a"
    assert without_password("http://me:p@ss@host") == "http://host"
    assert without_password("sqlite:///a@b.db") == "sqlite:///a@b.db"
    assert without_password("sqlite:////runs/a@b/mlflow.db") == "sqlite:////runs/a@b/mlflow.db"


def test_signals_to_the_whole_job_leave_the_helper_to_its_trainer(tmp_path, caplog):
    """As srun sends them before the time limit: the trainer saves, and all of its records are still sent."""
    training = Training(tmp_path / "runs" / "warned")
    for number in (signal.SIGUSR1, signal.SIGTERM):  # while Python still starts
        training.tracker._helper.send_signal(number)
    training.steps(3).finish("stopped")
    assert training.tracker._helper.returncode == 0 and not caplog.records
    run = client(tracking_uri(tmp_path / "runs")).get_run(run_id_of(tmp_path / "runs" / "warned"))
    assert run.info.status == "KILLED" and run.data.metrics["progress/step"] == 3


def test_a_trainer_whose_helper_was_killed_finishes(tmp_path, caplog):
    training = Training(tmp_path / "runs" / "alone")
    training.tracker._helper.kill()
    training.tracker._helper.wait()
    training.steps(3).finish("stopped")
    assert any("did not receive steps 1 to 3" in record.getMessage() for record in caplog.records)

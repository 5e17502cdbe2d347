"""The sender inside this process, on a real embedded store, with injected faults between them."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from megatrain.config.flatten import flatten
from megatrain.report.run_page import report
from megatrain.tracking import mlflow_database, mlflow_sender
from megatrain.tracking.events import EventLog
from megatrain.tracking.metrics import MetricsLog
from megatrain.tracking.mlflow_database import prepare_database
from megatrain.tracking.mlflow_run import text
from megatrain.tracking.mlflow_sender import Sender
from megatrain.tracking.mlflow_store import store_problem
from megatrain.tracking.sweep_record import SweepPoint, SweepRecord
from megatrain.tracking.system_metrics import SystemMetrics, parse_gpus


@pytest.fixture(autouse=True, scope="module")
def embedded():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


class Quiet:
    """A live trainer that collects the messages it gets."""

    gone = False

    def __init__(self):
        self.told = []

    def tell(self, **message):
        self.told.append(message)


def sender(run_dir, config=None, resumed_from_step=None):
    run_dir.mkdir(exist_ok=True)
    info = {
        "run_name": run_dir.name, "run_dir": str(run_dir), "config": config or {"seed": 1}, "layout": "",
        "resumed_from_step": resumed_from_step, "num_parameters": 1, "flops_per_token": 6.0, "world_size": 1,
        "device": "cpu", "dataset": {}, "dataset_fingerprint": "", "git_commit": None, "host": "here",
    }  # fmt: skip
    settings = {"experiment": "demo", "flush_every_s": 1.0, "system_metrics_every_s": 0.0, "finish_timeout_s": 5.0}
    return Sender({"info": info, "settings": settings, "parent": os.getpid()}, Quiet(), report)


def write(log, first, last):
    for step in range(first, last + 1):
        log.append({"step": step, "loss": 1 / step, "lr": 0.1})


def steps_at(one, name="loss"):
    return [point.step for point in one.client.get_metric_history(one.run_id, name)]


class Fails:
    """A client whose `log_batch` raises at its n-th call with metrics, before or after it has done the work."""

    def __init__(self, client, at, after):
        self._client, self._at, self._after, self._calls = client, at, after, 0

    def __getattr__(self, name):
        return getattr(self._client, name)

    def log_batch(self, run_id, **what):
        self._calls += "metrics" in what
        if self._calls == self._at and not self._after:
            self._calls += 1
            raise ConnectionError("lost")
        self._client.log_batch(run_id, **what)
        if self._calls == self._at and self._after:
            self._calls += 1
            raise ConnectionError("lost")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failed_request_loses_and_duplicates_nothing(runs, monkeypatch, at, after):
    """Also if the server had done the work and only its answer was lost."""
    monkeypatch.setattr(mlflow_sender, "MAX_METRICS", 11)
    run_dir = runs / f"fails-{at}-{after}"
    one = sender(run_dir)
    write(MetricsLog(run_dir / "metrics.jsonl"), 1, 17)
    one.connect()
    one.client = Fails(one.client, at, after)
    with pytest.raises(ConnectionError):
        one.send()
    one.send()
    assert steps_at(one) == list(range(1, 18)) and one.sent_step == 17
    again = sender(run_dir, resumed_from_step=17)
    again.run._lock = one.run._lock
    again.catch_up()
    assert again.run_id == one.run_id and again.sent_step == 17
    assert steps_at(one) == list(range(1, 18))


def test_a_log_that_is_cut_during_the_run_gives_no_duplicates(runs):
    """Whether the cut is noticed at once or only after the file has grown past the position read so far."""
    one = sender(runs / "cut")
    log = MetricsLog(runs / "cut" / "metrics.jsonl")
    write(log, 1, 20)
    one.catch_up()
    log.resume(8)
    one.catch_up()
    write(log, 9, 23)
    one.catch_up()
    log.resume(10)
    for step in range(11, 41):
        log.append({"step": step, "loss": 1 / step, "lr": 0.1, "more": "x" * (step % 7)})
    one.catch_up()
    assert steps_at(one) == list(range(1, 41))


def test_a_log_that_was_cut_and_grew_to_the_same_size_gives_no_gap(runs):
    """The line at the position where reading ended belongs to a later step than the next one."""
    one = sender(runs / "aligned")
    path = runs / "aligned" / "metrics.jsonl"

    def line(step, length):
        record = {"step": step, "loss": 1.0, "time": "2026-01-01T00:00:00.000Z"}
        return json.dumps(record).ljust(length) + "\n"

    path.write_text(line(1, 79) + line(2, 159))
    one.catch_up()
    path.write_text(line(1, 79) + line(2, 79) + line(3, 79) + line(4, 79))
    one.catch_up()
    assert steps_at(one) == [1, 2, 3, 4]


def test_a_line_is_sent_once_it_is_complete(runs):
    one = sender(runs / "half")
    path = runs / "half" / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0, "time": "2026-01-01T00:00:00.000Z"}\n{"step": 2, "lo')
    one.catch_up()
    with open(path, "ab") as file:
        file.write(b'ss": 2.0, "time": "2026-01-01T00:00:01.000Z"}\n')
    one.catch_up()
    assert steps_at(one) == [1, 2]


def test_a_run_deleted_on_the_server_is_created_again_with_all_steps(runs):
    one = sender(runs / "deleted")
    write(MetricsLog(runs / "deleted" / "metrics.jsonl"), 1, 5)
    one.catch_up()
    one.client.delete_run(one.run_id)
    again = sender(runs / "deleted", resumed_from_step=5)
    again.run._lock = one.run._lock
    again.catch_up()
    assert again.run_id != one.run_id and steps_at(again) == [1, 2, 3, 4, 5]
    assert "was deleted there" in again.parent.told[0]["warning"]


def test_a_run_or_an_experiment_deleted_during_training_gets_all_steps_again(runs, monkeypatch):
    """The run is made anew, the experiment restored. Each is told once it is true; restarts are sent again too."""
    monkeypatch.setattr(mlflow_sender, "FIRST_BACKOFF_S", 0.0)
    one = sender(runs / "gone")
    log = MetricsLog(runs / "gone" / "metrics.jsonl")
    events = EventLog(runs / "gone" / "events.jsonl")
    events.emit("start", 0)
    events.emit("resume", 2)
    one.settings["experiment"] = "deleted"
    write(log, 1, 5)
    one.catch_up()
    first = one.run_id
    one.client.delete_run(first)
    write(log, 6, 7)
    assert not one._try(one.catch_up)
    assert one._try(one.catch_up)
    second = one.run_id
    assert second != first and steps_at(one) == list(range(1, 8)) and restarts_of(one)[1] == [(1, 2)]
    warnings = [told["warning"] for told in one.parent.told if "warning" in told]
    assert f"run {first} was deleted there; the new run {second} gets all steps" in warnings
    experiment = one.client.get_experiment_by_name("deleted")
    one.client.delete_experiment(experiment.experiment_id)
    restore = type(one.client).restore_experiment
    monkeypatch.setattr(type(one.client), "restore_experiment", lambda *_: (_ for _ in ()).throw(OSError("forbidden")))
    write(log, 8, 9)
    for _ in range(3):
        assert not one._try(one.catch_up)
    told = "; ".join(str(message) for message in one.parent.told)
    assert "it was restored" not in told
    monkeypatch.setattr(type(one.client), "restore_experiment", restore)
    assert one._try(one.catch_up) and one.run_id == second and steps_at(one) == list(range(1, 10))
    assert one.client.get_experiment_by_name("deleted").lifecycle_stage == "active"
    assert sum("it was restored" in message.get("warning", "") for message in one.parent.told) == 1


def test_an_experiment_deleted_before_the_start_is_restored(runs):
    """A run with another config gets a run of its own in it."""
    one = sender(runs / "before", {"seed": 1})
    one.settings["experiment"] = "before"
    one.connect()
    one.client.delete_experiment(one.client.get_experiment_by_name("before").experiment_id)
    again = sender(runs / "before", {"seed": 2})
    again.settings["experiment"], again.run._lock = "before", one.run._lock
    again.connect()
    assert again.run_id != one.run_id and "it was restored" in again.parent.told[0]["warning"]
    assert again.client.get_run(again.run_id).info.lifecycle_stage == "active"


def test_what_a_server_refuses_does_not_hold_up_the_metrics(runs, monkeypatch):
    """Artifacts that this machine cannot write; calls and fields that an older server lacks."""
    from mlflow.exceptions import RestException
    from mlflow.tracking import MlflowClient

    def refuse(*_, **__):
        raise RestException({"error_code": "ENDPOINT_NOT_FOUND", "message": "no such endpoint"})

    def forbid(*_, **__):
        raise PermissionError(13, "Permission denied", "/srv/artifacts")

    get_run = MlflowClient.get_run

    def without_inputs(self, run_id):
        run = get_run(self, run_id)
        run._inputs = None
        return run

    monkeypatch.setattr(MlflowClient, "log_inputs", refuse)
    monkeypatch.setattr(MlflowClient, "log_artifact", forbid)
    monkeypatch.setattr(MlflowClient, "get_run", without_inputs)
    one = sender(runs / "refused", {"data": {"name": "books"}})
    one.info["dataset_fingerprint"] = "0" * 64
    (runs / "refused" / "config.yaml").write_text("a: 1\n")
    write(MetricsLog(runs / "refused" / "metrics.jsonl"), 1, 4)
    EventLog(runs / "refused" / "events.jsonl").emit("start", 0)
    assert one._try(lambda: one.finish("done"))
    assert steps_at(one) == [1, 2, 3, 4] and one.client.get_run(one.run_id).info.status == "FINISHED"
    warnings = [told["warning"] for told in one.parent.told if "warning" in told]
    assert [warning.partition(":")[0] for warning in warnings] == [
        "the run's dataset cannot be sent, the rest is", "the run's files cannot be sent, the rest is"
    ]  # fmt: skip
    assert "Permission denied: '/srv/artifacts'" in warnings[1]


def test_a_mixture_is_a_dataset_without_a_folder(runs):
    one = sender(runs / "mixed", {"data": {"name": "mixture", "kind": "mixture", "mixture": {"web": 1}}})
    one.info |= {"dataset_fingerprint": "0" * 64, "dataset": {"source": {"sources": {"web": "1" * 64}}}}
    write(MetricsLog(runs / "mixed" / "metrics.jsonl"), 1, 2)
    (runs / "mixed" / "config.yaml").write_text("a: 1\n")
    EventLog(runs / "mixed" / "events.jsonl").emit("start", 0)
    assert one._try(lambda: one.finish("done"))
    (used,) = one.client.get_run(one.run_id).inputs.dataset_inputs
    assert (used.dataset.source_type, used.dataset.source) == ("mixture", "{}")
    assert json.loads(used.dataset.profile)["source"]["sources"] == {"web": "1" * 64}


def test_a_refused_store_is_warned_about_once_with_its_remedy(runs, monkeypatch):
    monkeypatch.setattr(mlflow_sender, "FIRST_BACKOFF_S", 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (runs / "folder").as_uri())
    one = sender(runs / "file")
    assert not one._try(one.catch_up) and not one._try(one.catch_up)
    (told,) = one.parent.told
    assert "cannot be used now, training goes on" in told["warning"]
    assert "set `MLFLOW_ALLOW_FILE_STORE=true`" in told["warning"]


@pytest.mark.parametrize("content", ["", "[]", '{"embedded": 1}', "{"])
def test_a_damaged_mlflow_json_makes_a_new_run(runs, content):
    one = sender(runs / "json")
    (runs / "json" / "mlflow.json").write_text(content)
    one.connect()
    one.run._lock.close()
    assert (
        "mlflow.json is damaged" in one.parent.told[0]["warning"]
        and one.run_id in (runs / "json" / "mlflow.json").read_text()
    )


def test_a_fresh_start_is_another_mlflow_run_only_with_another_config(runs):
    """A run that fails before its first checkpoint starts again at step 1 and stays the same run."""
    ids = []
    for config in ({"seed": 1}, {"seed": 1}, {"seed": 2}):
        one = sender(runs / "anew", config=config)
        one.connect()
        one.run._lock.close()
        ids.append(one.run_id)
    assert ids[0] == ids[1] != ids[2]


def test_two_helpers_never_send_for_one_run_at_a_time(runs):
    one = sender(runs / "locked")
    one.connect()
    with pytest.raises(RuntimeError, match="earlier start of this run is still sending"):
        sender(runs / "locked").connect()


def test_many_and_long_parameters_fit(runs, monkeypatch):
    """A server takes at most 100 parameters a request; the embedded store would take more."""
    from mlflow.tracking import MlflowClient

    sizes, log_batch = [], MlflowClient.log_batch

    def counted(self, run_id, metrics=(), params=(), tags=()):
        sizes.append(len(params))
        log_batch(self, run_id, metrics=metrics, params=params, tags=tags)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    config = {"group": {f"key_{number}": number for number in range(250)}, "long": "y" * 7000}
    one = sender(runs / "many", config=config)
    one.connect()
    params = one.client.get_run(one.run_id).data.params
    assert params["group.key_249"] == "249" and len(params) == 253 and len(params["long"]) == 500
    assert sum(sizes) == 253 and max(sizes) <= 100


def test_config_becomes_dotted_keys_and_plain_texts():
    config = {"a": {"b": {"c": None}, "d": True}, "e": [1, 2.5], "f": "x", "g": ""}
    assert {name: text(value) for name, value in flatten(config).items()} == {
        "a.b.c": "null", "a.d": "true", "e": "[1, 2.5]", "f": "x", "g": ""
    }  # fmt: skip
    assert text("z" * 500) == "z" * 500 and text("z" * 501) == "z" * 497 + "..."


def test_system_samples_wait_for_the_server_in_bounded_memory(runs, monkeypatch):
    monkeypatch.setattr(mlflow_sender, "MAX_SYSTEM_SAMPLES", 3)
    one = sender(runs / "system")
    one.settings["system_metrics_every_s"] = 1e-6
    for _ in range(5):
        one._sample()
    assert len(one._samples) == 3 and one._dropped == 2
    assert one._try(one.catch_up)
    assert not one._samples and {"warning": "2 samples of system metrics did not fit and are lost"} in one.parent.told


def test_system_metrics_are_percentages_and_megabytes(tmp_path):
    sample = SystemMetrics(os.getpid(), tmp_path).sample()
    assert 0 < sample["system/system_memory_usage_percentage"] < 100
    assert 5 < sample["system/process_memory_megabytes"] < sample["system/system_memory_usage_megabytes"]


def test_gpus_are_read_from_nvidia_smi():
    answer = "0, 97, 1000, 312.45, 61\n1, 3, 20, [N/A], 30\n"
    assert parse_gpus(answer) == pytest.approx({
        "system/gpu_0_utilization_percentage": 97.0,
        "system/gpu_0_memory_usage_megabytes": 1048.576,
        "system/gpu_0_power_usage_watts": 312.45,
        "system/gpu_0_temperature_celsius": 61.0,
        "system/gpu_1_utilization_percentage": 3.0,
        "system/gpu_1_memory_usage_megabytes": 20.97152,
        "system/gpu_1_temperature_celsius": 30.0,
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------------- sweeps


def make_sweep(runs, name, *points):
    (runs / name).mkdir()
    SweepRecord([SweepPoint(point, {"seed": point[-1]}) for point in points]).save(runs / name)


def point_of(runs, sweep, name):
    return sender(runs / name, {"seed": 1, "run": {"name": name, "sweep": sweep}})


def family(one, sweep):
    """Return the ids of a sweep's own MLflow runs, and the parent that each child run names."""
    found = one.client.search_runs([one.client.get_run(one.run_id).info.experiment_id], max_results=1000)
    parents = {run.info.run_id: run.info.status for run in found if run.info.run_name == sweep}
    tags = {run.info.run_name: run.data.tags.get("mlflow.parentRunId") for run in found}
    return parents, {name: parent for name, parent in tags.items() if parent is not None and name.startswith(sweep)}


def test_points_of_a_sweep_share_one_parent_run_also_after_a_restart(runs):
    make_sweep(runs, "scan", "scan-1", "scan-2")
    senders = [point_of(runs, "scan", name) for name in ("scan-1", "scan-2")]
    for one in senders:
        one.connect()
        one.run._lock.close()
    again = point_of(runs, "scan", "scan-1")
    again.connect()
    parents, under = family(again, "scan")
    ((parent, status),) = parents.items()
    assert status == "FINISHED" and under == {"scan-1": parent, "scan-2": parent}
    assert again.run_id == senders[0].run_id and not any("warning" in told for told in again.parent.told)


def test_points_that_start_at_once_make_one_parent(runs):
    """All start at the same moment. The lock works between open files, so threads can stand in for processes."""
    names = [f"race-{number}" for number in range(4)]
    make_sweep(runs, "race", *names)
    together = threading.Barrier(len(names))

    def connect(name):
        one = point_of(runs, "race", name)
        found = one.run._find_or_create_parent

        def at_once(experiment_id):
            together.wait(60)
            return found(experiment_id)

        one.run._find_or_create_parent = at_once
        one.connect()
        return one

    with ThreadPoolExecutor(len(names)) as pool:
        senders = list(pool.map(connect, names))
    parents, under = family(senders[0], "race")
    assert len(parents) == 1 and under == dict.fromkeys(names, *parents)


def test_sweeps_of_the_same_name_are_kept_apart(runs):
    """For example, when several people track their sweeps on one server."""
    make_sweep(runs, "twice", "twice-1")
    first = point_of(runs, "twice", "twice-1")
    first.connect()
    SweepRecord([SweepPoint("twice-2", {"seed": "2"})]).save(runs / "twice")
    second = point_of(runs, "twice", "twice-2")
    second.connect()
    parents, under = family(second, "twice")
    assert len(parents) == 2 and set(under.values()) == set(parents)


def test_a_sweep_whose_folder_is_gone_only_causes_a_warning(runs):
    one = point_of(runs, "gone", "gone-1")
    one.connect()
    assert one.run_id and family(one, "gone") == ({}, {})
    assert "not a sweep's folder" in next(told["warning"] for told in one.parent.told if "warning" in told)


# ---------------------------------------------------------------------------------------------------- restarts


def restarts_of(one):
    """Return the restart tags and metric points that the server has."""
    tags = one.client.get_run(one.run_id).data.tags
    told = {name: value.partition(" (")[0] for name, value in tags.items() if name.startswith("restart_")}
    return told, [(int(point.value), point.step) for point in one.client.get_metric_history(one.run_id, "restarts")]


def test_every_restart_of_a_run_is_on_its_mlflow_run_once(runs):
    """Within a job, after a signal and after a kill without a record; a restarted helper sends no restart twice."""
    one = sender(runs / "restarts")
    log = EventLog(runs / "restarts" / "events.jsonl")
    log.emit("start", 0)
    log.emit("failure", 14, how="SIGKILL", rank=1, host="n7", phase="forward")
    log.emit("restart", 14, restarts=1)
    one.catch_up()
    assert restarts_of(one) == ({}, [])
    log.emit("resume", 10)
    one.catch_up()
    first = {"restart_1": "SIGKILL of rank 1 on n7 at step 14; from step 10"}
    assert restarts_of(one) == (first, [(1, 10)])
    one.run._lock.close()
    sent = []
    again = sender(runs / "restarts", resumed_from_step=20)
    again.connect()
    log_batch = again.client.log_batch
    again.client.log_batch = lambda *given, **what: (sent.append(what), log_batch(*given, **what))
    log.emit("signal", 20, signal=10)
    log.emit("stop", 20, status="stopped")
    log.emit("resume", 20)
    log.emit("resume", 25)
    log.emit("interrupt", 30)
    log.emit("signal", 30, signal=15)
    log.emit("stop", 30, status="stopped")
    log.emit("resume", 30)
    again.catch_up()
    assert again.run_id == one.run_id
    more = {
        "restart_2": "stopped by SIGUSR1 at step 20; from step 20",
        "restart_3": "ended without a word; from step 25",
        "restart_4": "stopped by Ctrl-C at step 30; from step 30",
    }
    assert restarts_of(again) == (first | more, [(1, 10), (2, 20), (3, 25), (4, 30)])
    assert [what["tags"][0].key for what in sent] == ["restart_2", "restart_3", "restart_4"]


def test_restarts_before_a_fresh_start_do_not_count_for_the_new_run(runs):
    """Another config at step 1 makes a new MLflow run; a rank that died before the first save makes a restart."""
    run_dir = runs / "beginning"
    run_dir.mkdir()
    log = EventLog(run_dir / "events.jsonl")
    died = {"how": "SIGSEGV", "rank": 0, "host": "n1", "phase": "forward"}
    log.emit("start", 0)
    log.emit("resume", 5)
    log.emit("failure", 7, **died)  # for the last time: not started again
    log.emit("start", 0)
    log.emit("failure", 2, **died)
    log.emit("restart", 2, restarts=1)
    log.emit("start", 0)
    one = sender(run_dir)
    one.catch_up()
    assert restarts_of(one) == ({"restart_1": "SIGSEGV of rank 0 on n1 at step 2; from step 0"}, [(1, 0)])


# ---------------------------------------------------------------------------------------------------- the database

KILL = """
import os, signal, sys
from sqlalchemy import Engine, event
@event.listens_for(Engine, "after_cursor_execute")
def kill(connection, cursor, statement, *_):
    if "CREATE TABLE secrets" in statement:
        os.kill(os.getpid(), signal.SIGKILL)
"""
"""Code that kills its process in the middle of the creation of MLflow's tables."""


def killed(code, *words):
    """Run `code` in a process that is killed while it creates MLflow's tables."""
    code = f"{KILL}\nsys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[2])]!r}\n{code}"
    ended = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def half_make(path):
    """Let MLflow itself create the database `path` and be killed."""
    killed(
        "from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore\n"
        "SqlAlchemyStore(f'sqlite:///{sys.argv[1]}', 'file:///nowhere')",
        path,
    )


def tracked(run_dir):
    """Track a run of three steps; return the warnings."""
    one = sender(run_dir)
    write(MetricsLog(run_dir / "metrics.jsonl"), 1, 3)
    one.catch_up()
    assert steps_at(one) == [1, 2, 3]
    return [told["warning"] for told in one.parent.told if "warning" in told]


def test_a_helper_killed_while_it_creates_the_database_leaves_none(tmp_path):
    """The next run creates it, without a word, and removes what was left."""
    killed(
        "from pathlib import Path; from test_mlflow_sender import sender; sender(Path(sys.argv[1])).connect()",
        tmp_path / "first",
    )
    assert not (tmp_path / "mlflow.db").exists() and len(list(tmp_path.glob("mlflow.db.creating-*"))) >= 1
    assert tracked(tmp_path / "second") == []
    assert {path.name for path in tmp_path.glob("mlflow*")} == {"mlflow.db", "mlflow.db.lock"}


def test_a_half_made_database_is_set_aside(tmp_path, monkeypatch):
    """The preflight leaves it to the helper, unless the user named the database."""
    monkeypatch.setattr(mlflow_database, "SETTLE_S", 0.0)
    path = tmp_path / "mlflow.db"
    half_make(path)
    content = path.read_bytes()
    assert store_problem(f"sqlite:///{path}", "demo", 1.0) is None
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        assert "holds no runs, and its tables are incomplete" in store_problem(f"sqlite:///{path}", "demo", 1.0)
    (warning,) = tracked(tmp_path / "run")
    (aside,) = tmp_path.glob("mlflow.half-made-*.db")
    assert f"{path} was half made and held no runs" in warning and warning.endswith(f"is now {aside.name}")
    assert aside.read_bytes() == content
    assert tracked(tmp_path / "other") == []


def test_a_database_with_runs_is_never_set_aside(tmp_path, monkeypatch):
    """Even if its tables have an earlier revision; then MLflow refuses it."""
    monkeypatch.setattr(mlflow_database, "SETTLE_S", 0.0)
    assert tracked(tmp_path / "run") == []
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    content = path.read_bytes()
    assert prepare_database(path, "file:///nowhere") is None and path.read_bytes() == content
    assert "was written by an earlier MLflow" in store_problem(f"sqlite:///{path}", "demo", 1.0)


def test_a_database_that_another_program_is_creating_is_waited_for(tmp_path):
    """`mlflow ui` creates it in place, without our lock."""
    assert prepare_database(tmp_path / "whole.db", "file:///nowhere") is None
    path = tmp_path / "mlflow.db"
    half_make(path)
    path.touch()
    later = threading.Timer(0.5, os.replace, (tmp_path / "whole.db", path))
    later.start()
    assert prepare_database(path, "file:///nowhere") is None
    later.join()
    assert not list(tmp_path.glob("*half-made*"))


def test_the_name_of_a_source_becomes_one_that_mlflow_takes():
    from mlflow.utils.validation import _validate_metric_name

    record = {"step": 1, "heldout_loss/中文": 2.0, "heldout_loss/c++ (new)": 3.0}
    sent = mlflow_sender.numbers(record)
    assert sent == {"heldout_loss/中文": 2.0, "heldout_loss/c__ _new_": 3.0}
    for name in sent:
        _validate_metric_name(name)


def test_a_finished_model_is_registered_once_with_its_line_as_tags(runs):
    run_dir = runs / "registered"
    tags = {"checkpoint": str(run_dir / "c"), "checksum": "1" * 32, "parents": "base step 5", "data": None}
    one = sender(run_dir)
    one.settings["register"], one.describe_model = True, lambda run_dir: tags
    write(MetricsLog(run_dir / "metrics.jsonl"), 1, 3)
    one.connect()
    one.finish("stopped")
    assert not one.client.search_model_versions("name = 'registered'"), "a run that goes on has no model yet"
    for _ in range(2):
        one.finish("done")
    (version,) = one.client.search_model_versions("name = 'registered'")
    assert version.tags["parents"] == "base step 5" and "data" not in version.tags
    assert version.run_id == one.run_id and version.source == str(run_dir / "c")
    assert not [told for told in one.parent.told if "warning" in told]
    tags["checksum"] = "2" * 32
    one.finish("done")
    assert len(one.client.search_model_versions("name = 'registered'")) == 2

"""metrics.jsonl and events.jsonl: a run's records can be read back, continued and cut."""

import json
import math
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatrain.errors import DataError
from megatrain.tracking import metrics
from megatrain.tracking.events import EventLog, read_events
from megatrain.tracking.metrics import MetricsLog, read_metrics


def fill(path, steps):
    log = MetricsLog(path)
    for step in steps:
        log.append({"step": step, "loss": 1 / step})
    log.close()


def steps_of(path):
    return [record["step"] for record in read_metrics(path)]


def test_floats_keep_every_bit(tmp_path):
    values = [random.Random(step).uniform(-1e3, 1e3) * 10.0**-step for step in range(1, 200)] + [5e-324, 0.1]
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step, value in enumerate(values, start=1):
        log.append({"step": step, "loss": value})
    assert [record["loss"] for record in read_metrics(log.path)] == values


def test_values_that_json_cannot_express_become_null(tmp_path):
    """A strict parser reads the file; `updated` says why the numbers are missing."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "parts": [-math.inf], "updated": False})

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads(log.path.read_text(), parse_constant=refuse)
    assert (record["loss"], record["grad_norm"], record["parts"], record["updated"]) == (None, None, [None], False)


def test_a_step_has_one_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 3})
    with pytest.raises(ValueError, match="step 3 does not follow step 3"):
        log.append({"step": 3})
    log.close()
    with pytest.raises(ValueError, match="step 2 does not follow step 3"):
        MetricsLog(log.path).append({"step": 2})


def test_a_line_is_in_the_file_when_append_returns(tmp_path):
    """A process that is killed right after `append` loses nothing."""
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path; from megatrain.tracking.metrics import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1])); log.append({'step': 1}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert steps_of(path) == [1]


@pytest.mark.parametrize("first_window", [16, 100, 1 << 16])
@pytest.mark.parametrize("step", [0, 1, 7, 19, 20, 25])
def test_resuming_cuts_records_beyond_the_step_and_keeps_them_aside(tmp_path, monkeypatch, step, first_window):
    monkeypatch.setattr(metrics, "FIRST_WINDOW", first_window)
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 21))
    whole = path.read_bytes()
    log = MetricsLog(path)
    aside = log.resume(step)
    kept = min(step, 20)
    assert steps_of(path) == list(range(1, kept + 1))
    assert path.read_bytes() + (aside.read_bytes() if aside else b"") == whole
    assert (aside is None) == (kept == 20)
    log.append({"step": kept + 1})
    assert steps_of(path) == list(range(1, kept + 2))


def test_each_cut_gets_a_file_of_its_own(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 5))
    assert MetricsLog(path).resume(2).name == "metrics.cut-1.jsonl"
    fill(path, range(3, 6))
    assert MetricsLog(path).resume(3).name == "metrics.cut-2.jsonl"
    assert steps_of(tmp_path / "metrics.cut-1.jsonl") == [3, 4]
    assert steps_of(tmp_path / "metrics.cut-2.jsonl") == [4, 5]


def test_a_partial_last_line_is_skipped_and_then_moved_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 4))
    with open(path, "ab") as file:
        file.write(b'{"step": 4, "lo')
    assert steps_of(path) == [1, 2, 3]
    log = MetricsLog(path)
    log.append({"step": 4, "loss": 0.5})
    assert steps_of(path) == [1, 2, 3, 4]
    assert (tmp_path / "metrics.cut-1.jsonl").read_bytes() == b'{"step": 4, "lo'


def test_a_tail_of_zeros_after_a_power_cut_is_moved_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 4))
    with open(path, "ab") as file:
        file.write(bytes(5000) + b"\n")
    MetricsLog(path).append({"step": 4})
    assert steps_of(path) == [1, 2, 3, 4]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_events_of_many_threads_and_writers_are_complete(tmp_path):
    path = tmp_path / "events.jsonl"
    logs = [EventLog(path), EventLog(path)]

    def emit(number):
        for step in range(100):
            logs[number % 2].emit("save", step, folder="x" * 500, number=number)

    threads = [threading.Thread(target=emit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = sorted((event["number"], event["step"]) for event in read_events(path))
    assert seen == [(number, step) for number in range(4) for step in range(100)]


def test_an_event_carries_time_kind_step_and_detail(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    returned = log.emit("skip", 7, path=tmp_path, loss=math.nan)
    (event,) = read_events(log.path)
    assert list(event) == ["time", "kind", "step", "path", "loss"]
    assert (event["kind"], event["step"], event["path"], event["loss"]) == ("skip", 7, str(tmp_path), None)
    assert event["time"] == returned["time"] and event["time"].endswith("Z")


def test_an_event_after_a_half_written_one_is_not_lost(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"time": "2026-01-01T00:00:00Z", "kind": "start", "step": 0}\n{"time": "2026-0')
    EventLog(path).emit("resume", 5)
    assert [event["kind"] for event in read_events(path)] == ["start", "resume"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("log", [MetricsLog, EventLog])
def test_a_full_disk_is_told_with_the_file(tmp_path, log):
    path = tmp_path / "records.jsonl"
    opened = log(path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, opened._fd if log is EventLog else opened._file.fileno())
    os.close(full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        opened.emit("start", 0) if log is EventLog else opened.append({"step": 1})
    assert caught.value.filename == str(path)
    opened.close()


@pytest.mark.parametrize("damage, lost", [(lambda text: b"\0" * len(text), (1, 3)), (lambda text: text[:-3], (3, 3))])
def test_steps_that_a_damaged_file_lacks_are_told_at_the_resume(tmp_path, damage, lost, caplog):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (1, 2, 3):
        log.append({"step": step})
    log.close()
    path.write_bytes(damage(path.read_bytes()))
    log = MetricsLog(path)
    log.resume(3)
    assert log.lacks(3) == lost and log.lacks(lost[0] - 1) is None
    assert log.unreadable.exists()
    log.close()
    again = MetricsLog(path)
    again.resume(3)
    assert again.lacks(3) is None, "it is told once"
    again.close()

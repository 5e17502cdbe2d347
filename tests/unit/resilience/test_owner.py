"""A run folder has one writer: in simultaneous starts, after a crash, across machines, after an owner wakes up."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatrain.errors import ConfigError, EnvironmentFault, OwnedError
from megatrain.resilience import owner
from megatrain.resilience.owner import Ownership, last_owner

HOLD = """
import pathlib, sys, time
from megatrain.resilience.owner import Ownership
Ownership.take(pathlib.Path(sys.argv[1]))
print("mine", flush=True)
time.sleep(60)
"""


def holder(folder):
    """Start another process that owns the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    return process


def elsewhere(folder, number=1, **changes):
    """Write the mark of an owner on another machine."""
    (folder / "owner").mkdir(exist_ok=True)
    path = folder / "owner" / f"{number:08d}.json"
    mark = {"host": "far", "job": None, "pid": 77, "since": "2026-01-01T00:00:00Z", "machine": "far x y"} | changes
    path.write_text(json.dumps(mark))
    return path


def test_a_second_job_is_refused_and_told_who_owns_the_run(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(OwnedError, match=rf"host .*, process {process.pid}, since 20..-.*another run.name") as caught:
        Ownership.take(tmp_path)
    assert caught.value.exit_code == 7
    process.kill()
    process.wait()
    assert Ownership.take(tmp_path).number == 2, "an owner that was killed is replaced at once"


def test_a_stopped_process_still_owns_its_run(tmp_path):
    process = holder(tmp_path)
    process.send_signal(19)
    with pytest.raises(OwnedError):
        Ownership.take(tmp_path)
    process.kill()
    process.wait()


def test_of_many_simultaneous_starts_one_becomes_the_owner(tmp_path):
    def take(_):
        try:
            return Ownership.take(tmp_path)
        except OwnedError:
            return None

    with ThreadPoolExecutor(16) as pool:
        assert len([mine for mine in pool.map(take, range(64)) if mine]) == 1


def test_a_replaced_owner_may_no_longer_write(tmp_path):
    """Even if its own process is still alive."""
    sleeper = Ownership.take(tmp_path)
    sleeper.check()
    elsewhere(tmp_path, number=2)
    with pytest.raises(OwnedError, match="was taken over by host far, process 77"):
        sleeper.check()
    sleeper.release()
    assert last_owner(tmp_path / "owner")[0] == 2 and "released" not in last_owner(tmp_path / "owner")[1]


def test_an_owner_whose_marks_were_removed_may_no_longer_write(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    first = Ownership.take(run_dir)
    shutil.rmtree(run_dir / "owner")
    with pytest.raises(OwnedError, match="someone who removed this job's owner file"):
        first.check()
    monkeypatch.setattr(owner, "identity", lambda: {"host": "n7", "pid": 1, "since": "today"})
    second = Ownership.take(run_dir)
    assert second.number == first.number
    monkeypatch.setattr(owner, "BEAT_S", 0)
    second.check()
    with pytest.raises(OwnedError, match="taken over by host n7"):
        first.check()
    shutil.rmtree(run_dir)
    with pytest.raises(OwnedError, match="is gone, moved or removed"):
        second.check()


@pytest.mark.parametrize(("number", "kind"), [(errno.EROFS, EnvironmentFault), (errno.EACCES, ConfigError)])
def test_a_failing_disk_is_a_machine_fault_and_a_forbidden_folder_a_user_error(tmp_path, monkeypatch, number, kind):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(owner, "_create", refuse)
    with pytest.raises(kind, match="cannot be written"):
        Ownership.take(tmp_path)


def test_an_owner_that_released_the_run_is_replaced_at_once(tmp_path):
    first = Ownership.take(tmp_path)
    first.release()
    started = time.monotonic()
    assert Ownership.take(tmp_path).number == 2
    assert time.monotonic() - started < 1


def test_an_owner_on_another_machine_is_watched_for_signs_of_life(tmp_path, capsys):
    """The run is taken over once its owner shows no sign of life, and refused before; other machines' clocks do not
    matter."""
    path = elsewhere(tmp_path)
    os.utime(path, (4e9, 4e9))
    assert Ownership.take(tmp_path, watch_s=0.5).number == 2
    assert "watching it for 0.5 s" in capsys.readouterr().err
    path = elsewhere(tmp_path, number=3)
    with ThreadPoolExecutor(1) as pool:
        beats = pool.submit(lambda: [time.sleep(0.1) or os.utime(path) for _ in range(10)])
        with pytest.raises(OwnedError, match="host far"):
            Ownership.take(tmp_path, watch_s=2)
        beats.result()


def test_a_requeued_job_takes_over_from_itself(tmp_path, monkeypatch):
    elsewhere(tmp_path, job="41")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    started = time.monotonic()
    assert Ownership.take(tmp_path).number == 2
    assert time.monotonic() - started < 1


def test_an_unreadable_mark_is_watched_like_an_unknown_owner(tmp_path):
    elsewhere(tmp_path).write_text("{half")
    assert Ownership.take(tmp_path, watch_s=0.3).number == 2


def test_signs_of_life_are_written_in_time(tmp_path, monkeypatch):
    mine = Ownership.take(tmp_path)
    path = tmp_path / "owner" / "00000001.json"
    os.utime(path, (1, 1))
    mine.beat()
    assert path.stat().st_mtime == 1, "not yet due"
    monkeypatch.setattr(owner, "BEAT_S", 0)
    mine.check()
    assert path.stat().st_mtime > 1e9


KILLED = """
import os, pathlib, signal, sys
from megatrain.resilience.owner import Ownership
os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Ownership.take(pathlib.Path(sys.argv[1]))
"""


def test_what_a_job_leaves_that_was_killed_while_it_became_the_owner_is_removed(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert len(list((tmp_path / "owner").iterdir())) == 1, "a half-made mark"
    Ownership.take(tmp_path)
    assert [path.name for path in (tmp_path / "owner").iterdir()] == ["00000001.json"]

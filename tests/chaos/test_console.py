"""Terminals, pipes and redirected streams that break while a job trains: the run goes on, and its logs have all."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import pytest
from support.commands import TRAIN, events, metrics

from megatrain.launch.rank_process import free_port

STEPS = 12
JOB = [*TRAIN, "engine=native", f"train.steps={STEPS}", "checkpoint.every=4", "train.eval_every=4"]


def begin(folder, name, *words, shell="", environ=None, **streams):
    """Start a job in the folder. `shell` redirects its streams as a shell does."""
    command = [sys.executable, "-m", "megatrain", *JOB, f"run.name={name}", *words]
    return subprocess.Popen(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *command], cwd=folder, env={**os.environ, **(environ or {})}, **streams
    )


def full_pipe():
    """Return both ends of a pipe that takes nothing more, because its reader does not read."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"\0" * 4096)
    os.set_blocking(writer, True)
    return reader, writer


def is_complete(folder, name):
    """Return whether every step was done once, and the run was saved at its end."""
    saved = (folder / "runs" / name / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").exists()
    return saved and [record["step"] for record in metrics(folder, name)] == [*range(1, STEPS + 1)]


def wait_for_step(folder, name, step):
    deadline = time.monotonic() + 120
    while not any(record["step"] >= step for record in metrics(folder, name)):
        assert time.monotonic() < deadline, "the job does not train"
        time.sleep(0.02)


def log(folder, name, file="rank_00000.log"):
    return (folder / "runs" / name / "logs" / file).read_text()


def test_a_job_trains_to_its_end_when_its_reader_leaves(workplace):
    """As `<&- 2>&1 | head -2`: exit code 0, and what was not shown is in the log."""
    job = begin(workplace, "head", "launch.nproc_per_node=2", shell="<&- 2>&1", stdout=subprocess.PIPE)
    lines = iter(job.stdout.readline, b"")
    assert any(line.startswith(b"run head: ") for line in lines) and next(lines)
    job.stdout.close()
    assert job.wait(240) == 0
    assert is_complete(workplace, "head")
    assert f"step {STEPS}/{STEPS}  loss" in log(workplace, "head") and "run done" in log(workplace, "head")


def test_ctrl_c_saves_when_the_reader_of_the_pipe_dies_of_it_first(workplace):
    """As `2>&1 | tee log`: exit code 75, as without the pipe."""
    job = begin(workplace, "tee", "train.steps=100000", shell="2>&1", stdout=subprocess.PIPE)
    wait_for_step(workplace, "tee", 2)
    job.stdout.close()
    job.send_signal(signal.SIGINT)
    assert job.wait(120) == 75
    (stop,) = events(workplace, "tee", "stop")
    assert stop["status"] == "stopped" and metrics(workplace, "tee")[-1]["step"] == stop["step"]
    assert (workplace / "runs" / "tee" / "checkpoints" / f"step_{stop['step']:08d}" / "manifest.json").exists()
    assert "stopping: the ranks save and end" in log(workplace, "tee", "agent_00000.log")
    assert "run stopped" in log(workplace, "tee")


def test_full_disks_and_a_reader_that_does_not_read_stop_nothing(workplace):
    """Standard output and the log lead to a full disk, standard error to a full pipe."""
    logs = workplace / "runs" / "full" / "logs"
    logs.mkdir(parents=True)
    for name in ("rank_00000.log", "agent_00000.log", "fork_server.log"):
        (logs / name).symlink_to("/dev/full")
    reader, writer = full_pipe()
    job = begin(workplace, "full", shell=">/dev/full", stderr=writer)
    os.close(writer)
    assert job.wait(240) == 0
    assert is_complete(workplace, "full")
    os.close(reader)


def test_a_launchers_rank_outlives_its_streams(workplace):
    """Under another launcher there is no agent; its rank has lost all three streams."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job = begin(workplace, "launched", shell="<&- >&- 2>&-", environ={**alone, **address})
    assert job.wait(240) == 0
    assert is_complete(workplace, "launched")
    assert "run done" in log(workplace, "launched")


@pytest.mark.parametrize(("is_told", "code"), [(True, 75), (False, 0)])
def test_a_terminal_may_close(workplace, is_told, code):
    """A job that gets the hangup signal saves and ends; another one trains on without a terminal."""
    name = f"closed-{code}"
    master, terminal = pty.openpty()

    def lead():
        os.setsid()
        if is_told:
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    steps = "train.steps=100000" if is_told else f"train.steps={STEPS}"
    job = begin(workplace, name, steps, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=lead)
    os.close(terminal)
    os.read(master, 10)  # it prints
    if is_told:
        wait_for_step(workplace, name, 2)
    os.close(master)
    assert job.wait(240) == code
    assert events(workplace, name, "stop")[-1]["status"] == ("stopped" if is_told else "done")
    assert is_told or is_complete(workplace, name)
    assert f"run {'stopped' if is_told else 'done'}" in log(workplace, name)

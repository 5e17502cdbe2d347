"""Faults during saves and of the checkpoints' disk, in real processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.commands import TRAIN, TWO_NATIVE, events, final_files, megatrain, metrics, same, start
from support.faults import fault, preloaded, run_with

from megatrain.checkpoint.store import verify

TOOLS = Path(__file__).parents[2] / "tools"


def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path):
    """A short version of `tools/kill_saves.py --n 1000`."""
    command = [sys.executable, str(TOOLS / "kill_saves.py"), "--n", "30", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 corrupt loads, 0 written checkpoints lost" in done.stdout
    assert int(re.search(r"(\d+) of them while a save was in progress", done.stdout)[1]) >= 5, done.stdout


LONG = [*TRAIN, "engine=native", "train.steps=600", "checkpoint.every=20", "train.eval_every=0", "train.eval_steps=1"]
PATIENCE = ["checkpoint.retry_wait_s=0.2", "checkpoint.retries=4"]


@pytest.fixture
def small_disk(workplace):
    """Mount a disk with room for three checkpoints as the checkpoint folder of the run `disk`."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    folder = workplace / "runs" / "disk" / "checkpoints"
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder, mode):
    return (
        subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], capture_output=True, check=False).returncode
        == 0
    )


def wait_until(true, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_disk_that_fails_stops_training_only_if_it_keeps_failing(workplace, small_disk):
    """While the disk is read-only, saving is retried and training continues. On a full disk the job ends with a clear
    message and an intact last checkpoint; restarted with free space, it ends like the undisturbed run."""
    assert megatrain(workplace, *LONG, "run.name=whole").returncode == 0
    process = start(workplace, *LONG, *PATIENCE, "run.name=disk")
    saved = lambda kind="save": events(workplace, "disk", kind)  # noqa: E731
    wait_until(lambda: (workplace / "runs/disk/events.jsonl").exists() and len(saved()) >= 2, process)
    wait_until(lambda: remount(small_disk, "ro"), process)  # refused while a file of it is being written
    wait_until(lambda: saved("save_failed"), process)
    assert remount(small_disk, "rw")
    failed_at = saved("save_failed")[-1]["step"]
    wait_until(lambda: saved()[-1]["step"] >= failed_at, process)
    assert "Read-only file system" in saved("save_failed")[0]["reason"]
    filler = small_disk / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], capture_output=True, check=False)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 8, stderr
    assert "5 saves in a row have failed (checkpoint.retries=4)" in stderr and "No space left on device" in stderr
    assert len(metrics(workplace, "disk")) > saved("save_failed")[-5]["step"], "training continued meanwhile"
    left = [path for path in small_disk.iterdir() if path != filler]
    assert left and all(verify(path) for path in left), "saved checkpoints are intact, and no partial one is left"
    filler.unlink()
    done = megatrain(workplace, *LONG, *PATIENCE, "run.name=disk")
    assert done.returncode == 0, done.stderr
    same(metrics(workplace, "disk"), metrics(workplace, "whole"))
    assert final_files(workplace, "disk") == final_files(workplace, "whole")


def test_a_disk_with_io_errors_stops_training_only_if_they_persist(workplace, undisturbed_native, tmp_path):
    """One write, one flush and one rename of one rank fail; then every write of the other rank fails."""
    flag = tmp_path / "eio"
    words = [*TWO_NATIVE, "run.name=eio", "checkpoint.retry_wait_s=0.1", "checkpoint.retries=4"]
    environ = {**preloaded("eio.c", tmp_path), "EIO_PATH": ".writing", "EIO_FLAG": str(flag)}
    broken = {4: (1, "write once"), 14: (1, "fsync once"), 24: (0, "rename once"), 34: (1, "write")}
    faults = [
        fault(rank, step, "data", "run", by=f"echo {what} > {flag}.{rank}") for step, (rank, what) in broken.items()
    ]
    done = run_with(workplace, faults, *words, environ=environ)
    assert done.returncode == 8, done.stderr
    assert "5 saves in a row have failed (checkpoint.retries=4)" in done.stderr
    assert "Input/output error" in done.stderr and "Traceback" not in done.stderr
    failed = events(workplace, "eio", "save_failed")
    assert [event["step"] for event in failed if event["step"] < 30] == [5, 15, 25]
    assert all("Input/output error" in event["reason"] for event in failed)
    assert [event["failures"] for event in failed][-5:] == [1, 2, 3, 4, 5]
    seen = metrics(workplace, "eio")
    same(seen, undisturbed_native[: len(seen)])
    assert len(seen) > 35, "training continued meanwhile"
    left = list((workplace / "runs" / "eio" / "checkpoints").iterdir())
    assert max(left).name == "step_00000030" and all(verify(path) for path in left), left
    Path(f"{flag}.1").unlink()
    done = run_with(workplace, [], *words, environ=environ)
    assert done.returncode == 0, done.stderr
    assert [event["step"] for event in events(workplace, "eio", "resume")] == [30]
    same(metrics(workplace, "eio"), undisturbed_native)
    assert final_files(workplace, "eio") == final_files(workplace, "undisturbed-native")

"""Copies of the state in memory: a fault costs the steps since the last copy, not since the last save."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.commands import TRAIN, TWO_NATIVE, events, final_files, megatrain, metrics, same
from support.faults import fault, run_with

FAR = ["checkpoint.every=1000", "checkpoint.memory_every=3"]


@pytest.mark.parametrize("engine", ["deepspeed", "native"])
def test_a_restart_continues_from_the_copy_in_memory(workplace, engine, request):
    """Only the last checkpoint is on disk: each of two deaths costs the steps since the last copy."""
    expected = request.getfixturevalue("undisturbed" if engine == "deepspeed" else "undisturbed_native")
    name = f"copies-{engine}"
    done = run_with(
        workplace,
        [fault(1, 14, "backward", "SIGKILL"), fault(0, 23, "update", "SIGKILL")],
        *TRAIN, *FAR, f"engine={engine}", f"run.name={name}", "launch.nproc_per_node=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    resumes = events(workplace, name, "resume")
    assert [event["copy"] for event in resumes] == ["in memory"] * 2
    assert 14 - 2 * 3 <= resumes[0]["step"] < 14 and 23 - 2 * 3 <= resumes[1]["step"] < 23
    same(metrics(workplace, name), expected)
    whole = "undisturbed" if engine == "deepspeed" else "undisturbed-native"
    assert final_files(workplace, name) == final_files(workplace, whole)


def test_a_job_that_fails_leaves_its_copy_on_disk_for_any_layout(workplace, undisturbed):
    """Without restarts the agent writes the copy to disk, and another engine on another number of ranks continues."""
    died = run_with(
        workplace,
        [fault(1, 14, "backward", "SIGKILL")],
        *TRAIN, *FAR, "run.name=moved", "launch.nproc_per_node=2", "resilience.max_restarts=0",
    )  # fmt: skip
    assert died.returncode == 1, died.stderr
    (rescue,) = events(workplace, "moved", "rescue")
    assert 14 - 2 * 3 <= rescue["step"] < 14 and "made" in died.stderr and rescue["checkpoint"] in died.stderr
    done = megatrain(workplace, *TRAIN, *FAR, "run.name=moved", "engine=native", "parallel.zero=2")
    assert done.returncode == 0, done.stderr
    assert [event["step"] for event in events(workplace, "moved", "resume")] == [rescue["step"]]
    records = metrics(workplace, "moved")
    same(records, undisturbed, keys=("step", "lr", "tokens", "batch_hash", "updated"))
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(records, undisturbed, strict=True)) < 1e-5


def test_too_little_memory_is_reported_once_and_stops_nothing(workplace, undisturbed_native):
    if os.geteuid() != 0:
        pytest.skip("mounting a small memory takes root")
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=100k tmpfs /dev/shm && exec "$@"', "sh"]
    command = [sys.executable, "-m", "megatrain", *TWO_NATIVE, *FAR, "run.name=small"]
    done = subprocess.run([*small, *command], cwd=workplace, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("copies in memory are disabled") == 1 and "No space left on device" in done.stderr
    assert len(events(workplace, "small", "copy_failed")) == 1
    same(metrics(workplace, "small"), undisturbed_native)

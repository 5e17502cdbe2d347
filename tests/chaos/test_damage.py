"""Real jobs that start on damaged checkpoints; the oracle is an undisturbed run.

tests/unit/checkpoint/test_damage.py covers every kind of damage that `verify` detects.
"""

from __future__ import annotations

import shutil

import pytest
from support.commands import TRAIN, events, final_files, megatrain, metrics, same, start
from support.faults import fault, run_with

JOB = [*TRAIN, "engine=native", "launch.preflight=false"]
NEWEST, BEFORE = "step_00000020", "step_00000015"
SHARD, MANIFEST = "0.safetensors", "manifest.json"


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "shard-cut": (SHARD, lambda path: cut(path, 0.7)),
    "bit-flipped": (SHARD, flip),
    "shard-missing": (SHARD, lambda path: path.unlink()),
    "manifest-empty": (MANIFEST, lambda path: cut(path, 0)),
    "manifest-cut": (MANIFEST, lambda path: cut(path, 0.7)),
}


@pytest.fixture(scope="module")
def killed(workplace):
    """Return the intact folder of a run killed at step 22, with checkpoints of steps 15 and 20.

    The run `damage-whole` is the oracle: it was not killed.
    """
    whole = start(workplace, *JOB, "run.name=damage-whole")
    died = run_with(
        workplace,
        [fault(0, 22, "backward", "SIGKILL")],
        *JOB, "run.name=damage", "resilience.max_restarts=0", "checkpoint.background=false",  # on the disk when it dies
    )  # fmt: skip
    assert died.returncode == 1, died.stderr
    _, stderr = whole.communicate(timeout=240)
    assert whole.returncode == 0, stderr
    folder = workplace / "runs" / "damage"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [BEFORE, NEWEST]
    return folder


def copy_of(killed, name):
    """Return another run in the state of the killed one."""
    return shutil.copytree(killed, killed.with_name(name))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_used(workplace, killed, kind):
    """By default the job resumes from the previous checkpoint and ends with the same bits. With the damaged checkpoint
    as `checkpoint.resume`, it refuses and changes nothing."""
    file, damage = DAMAGES[kind]
    name, told = f"damage-{kind}", f"damage-{kind}-told"
    for folder in (copy_of(killed, name), copy_of(killed, told)):
        damage(folder / "checkpoints" / NEWEST / file)
    before = contents(killed.with_name(told) / "checkpoints")
    resume = f"checkpoint.resume=runs/{told}/checkpoints/{NEWEST}"
    refused = start(workplace, *JOB, f"run.name={told}", resume)
    done = megatrain(workplace, *JOB, f"run.name={name}")
    _, says = refused.communicate(timeout=240)

    assert done.returncode == 0, done.stderr
    damaged = f"{name}/checkpoints/{NEWEST}"
    assert "skipping the damaged checkpoint" in done.stderr and f"{damaged}/{file}" in done.stderr
    (skip,) = events(workplace, name, "skip")
    assert f"{damaged}/{file}" in skip["reason"]
    assert [event["step"] for event in events(workplace, name, "resume")] == [15]
    same(metrics(workplace, name), metrics(workplace, "damage-whole"))
    assert final_files(workplace, name) == final_files(workplace, "damage-whole")

    assert refused.returncode == 4, says
    assert f"{told}/checkpoints/{NEWEST}/{file}" in says
    assert contents(killed.with_name(told) / "checkpoints") == before
    assert metrics(workplace, told) == metrics(workplace, "damage"), "no step was done"


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_from_scratch(workplace, killed):
    folder = copy_of(killed, "damage-all")
    flip(folder / "checkpoints" / NEWEST / SHARD)
    cut(folder / "checkpoints" / BEFORE / MANIFEST, 0.7)
    before = contents(folder / "checkpoints")
    done = megatrain(workplace, *JOB, "run.name=damage-all")
    assert done.returncode == 4, done.stderr
    assert f"{NEWEST}/{SHARD}" in done.stderr and f"{BEFORE}/{MANIFEST}" in done.stderr
    assert contents(folder / "checkpoints") == before
    assert metrics(workplace, "damage-all") == metrics(workplace, "damage"), "no step was done"
    assert not events(workplace, "damage-all", "resume") and len(events(workplace, "damage-all", "start")) == 1

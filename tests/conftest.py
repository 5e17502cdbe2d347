"""Shared by all tests: one thread a rank, the helpers of this folder importable by name, and one small job to compare with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).parent))  # for tests/support

from torch import cuda

os.environ.setdefault("TRITON_INTERPRET", "0" if cuda.is_available() else "1")  # read when Triton is imported


def pytest_collection_modifyitems(items):
    """For pytest-xdist (--dist loadgroup): whole jobs are one group, for they share a dataset, a run to compare with and a
    cluster; each file of the others is one, for what its fixtures make."""
    for item in items:
        parts = item.path.parts
        jobs = {"chaos", "slurm", "e2e"} & set(parts)
        item.add_marker(pytest.mark.xdist_group("jobs" if jobs else item.path.stem))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a small prepared dataset, shared by all: a run's name belongs to one test."""
    from support.commands import megatrain

    folder = tmp_path_factory.mktemp("work")
    (folder / "text").mkdir()
    for source in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
        (folder / "text" / f"{source.stem}.txt").write_bytes(source.read_bytes())
    done = megatrain(
        folder, "prepare", "data=files", "data.name=tiny", "data.paths=[text/*.txt]", "tokenizer.vocab_size=400"
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def undisturbed(workplace):
    """The metrics of a run of two ranks, ZeRO-3, that nothing disturbed; it is called `undisturbed`."""
    from support.commands import TRAIN, megatrain, metrics

    done = megatrain(workplace, *TRAIN, "run.name=undisturbed", "launch.nproc_per_node=2")
    assert done.returncode == 0, done.stderr
    return metrics(workplace, "undisturbed")


@pytest.fixture(scope="session")
def undisturbed_native(workplace):
    """The same on the native engine, whose processes start in half the time; it is called `undisturbed-native`."""
    from support.commands import TWO_NATIVE, megatrain, metrics

    done = megatrain(workplace, *TWO_NATIVE, "run.name=undisturbed-native")
    assert done.returncode == 0, done.stderr
    return metrics(workplace, "undisturbed-native")

"""A Slurm cluster of four nodes for the tests of this folder.

Without Slurm the tests skip, unless MEGATRAIN_REQUIRE_SLURM=1."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    from support.cluster import Cluster, missing

    if reason := missing():
        if os.environ.get("MEGATRAIN_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def expected(workplace):
    """Return the metrics of the same job on two local ranks, undisturbed; the run is called `expected`."""
    from support.commands import megatrain, metrics
    from support.jobs_on_slurm import JOB

    done = megatrain(workplace, *JOB, "run.name=expected", "launch.nproc_per_node=2")
    assert done.returncode == 0, done.stderr
    return metrics(workplace, "expected")

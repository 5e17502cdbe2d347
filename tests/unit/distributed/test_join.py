"""Joining the other ranks: signals are heard, waits end, and one rank needs nobody."""

from __future__ import annotations

import errno
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from megatrain.config import LaunchConfig
from megatrain.distributed import world
from megatrain.distributed.rank_environment import RankEnvironment
from megatrain.distributed.world import StoppedWhileJoining, join, leave
from megatrain.errors import EnvironmentFault


@pytest.fixture
def waiting():
    """Return work that waits until the test is over."""
    over = threading.Event()
    yield lambda: over.wait(60)
    over.set()


def test_a_rank_that_waits_for_the_others_hears_a_signal(waiting):
    asked = iter([False, False, True])
    started = time.monotonic()
    with pytest.raises(StoppedWhileJoining):
        world._within(timedelta(seconds=50), lambda: next(asked), waiting)
    assert time.monotonic() - started < 25


def test_joining_ends_even_if_torch_never_answers(waiting, monkeypatch):
    monkeypatch.setattr(world, "RENDEZVOUS_GRACE_S", 0.1)
    with pytest.raises(TimeoutError, match="another program may have this port"):
        world._within(timedelta(seconds=0.1), lambda: False, waiting)


def test_an_error_while_joining_is_the_callers():
    def fail():
        raise ValueError("no such host")

    with pytest.raises(ValueError, match="no such host"):
        world._within(timedelta(seconds=50), lambda: False, fail)


def test_one_rank_meets_nobody_and_every_later_group_waits_no_longer_than_the_limit(monkeypatch):
    """Groups of meshes, pipelines and libraries are made without a timeout of their own."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(c10d, name, getattr(c10d, name))  # put back afterwards
    nowhere = RankEnvironment(master_addr="host.invalid", master_port=1)
    joined = join(LaunchConfig(device="cpu", timeout_s=7.0), nowhere)
    try:
        assert (joined.size, joined.control) == (1, None)
        limit = timedelta(seconds=7)
        groups = [dist.group.WORLD, dist.new_group(), dist.new_group([0], use_local_synchronization=True)]
        groups.append(dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))["a"].get_group())
        for group in groups:
            assert group is not None
            assert group._get_backend(torch.device("cpu")).options._timeout == limit
    finally:
        leave()


def test_ranks_of_a_node_without_loopback_are_told_at_once(monkeypatch):
    """torch would try for launch.timeout_s, and then name an address that nobody gave."""

    def unreachable(*given, **named):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr(world, "_connect", lambda *given: pytest.fail("it asked torch"))
    for address in ("127.0.0.1", "localhost"):
        place = RankEnvironment(rank=1, world_size=2, master_addr=address, master_port=1)
        with pytest.raises(EnvironmentFault, match=r"cannot reach each other at 127.0.0.1 .*no loopback interface"):
            join(LaunchConfig(device="cpu", timeout_s=600.0), place)


def test_a_node_with_loopback_joins():
    world._check_loopback(RankEnvironment(world_size=2, master_addr="127.0.0.1"))

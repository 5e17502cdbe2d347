"""A rank's view of the world: its device, and its message about a peer that ended."""

import subprocess
import sys

import pytest
import torch

from megatrain.config import LaunchConfig
from megatrain.distributed import visible_gpus
from megatrain.distributed.devices import device_of_rank
from megatrain.distributed.rank_environment import RankEnvironment
from megatrain.errors import EnvironmentFault

TWO_RANKS = """
import datetime, os, sys
import torch, torch.distributed as dist
from megatrain.distributed.world import World
from megatrain.resilience.fault_classes import JOB, PEER, classify

rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30))
world = World(rank, 2, rank, torch.device("cpu"), dist.new_group(backend="gloo"))
world.all_gather(torch.tensor(rank))
if rank == 1:
    os._exit(3)
try:
    world.all_gather(torch.tensor(rank))
except RuntimeError as error:
    assert classify(error) == PEER, error
    assert classify(RuntimeError("shape mismatch")) == classify(ValueError("gloo/transport")) == JOB
    os._exit(0)
os._exit(1)
"""


def test_an_exchange_with_a_rank_that_ended_reports_a_lost_peer(tmp_path, monkeypatch):
    """The error is classified as a lost peer, not as a defect that the user should report."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-c", TWO_RANKS]
    other = subprocess.Popen([*command, "1", str(tmp_path / "store")])
    mine = subprocess.run([*command, "0", str(tmp_path / "store")], capture_output=True, text=True, timeout=50)
    assert other.wait(timeout=10) == 3
    assert mine.returncode == 0, mine.stderr


@pytest.mark.parametrize(
    ("asked", "available", "chosen"),
    [
        ("auto", 0, "cpu"), ("auto", 2, "cuda:1"), ("auto", 1, None), ("cuda", 2, "cuda:1"), ("cuda", 1, None),
        ("cuda", 0, None), ("cpu", 4, "cpu"),
    ],
)  # fmt: skip
def test_too_few_devices_are_refused_instead_of_using_the_cpu(asked, available, chosen, monkeypatch):
    """The second of two ranks gets its own device, the CPU if there is no device or the user chose it, or an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    config, second = LaunchConfig(device=asked), RankEnvironment(1, 1, 2, 2, "x", 1)
    if chosen is not None:
        assert device_of_rank(config, second) == torch.device(chosen)
        return
    have = f"at most {available} can be used" if available else "none can be used"
    remedy = f"launch.nproc_per_node={available}" if available else "launch.device=cpu"
    monkeypatch.setattr(visible_gpus, "limit", lambda: None)
    message = f"launch.device={asked} needs 2 GPUs on .*, one for each rank, but {have}: .*or give {remedy}"
    with pytest.raises(EnvironmentFault, match=message):
        device_of_rank(config, second)

"""The ranks as one of them sees them: what it makes of a peer that is gone."""

import subprocess
import sys

TWO_RANKS = """
import datetime, os, sys
import torch, torch.distributed as dist
from megatrain.launch.world import World, lost_peer

rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30))
world = World(rank, 2, rank, torch.device("cpu"), dist.new_group(backend="gloo"))
world.gather(torch.tensor(rank))
if rank == 1:
    os._exit(3)
try:
    world.gather(torch.tensor(rank))
except RuntimeError as error:
    assert lost_peer(error), error
    assert not lost_peer(RuntimeError("shape mismatch")) and not lost_peer(ValueError("gloo/transport"))
    os._exit(0)
os._exit(1)
"""


def test_an_exchange_with_a_rank_that_ended_is_known_for_what_it_is(tmp_path, monkeypatch):
    """The other rank's end is told from a defect of ours, so that nobody is asked to report it."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-c", TWO_RANKS]
    other = subprocess.Popen([*command, "1", str(tmp_path / "store")])
    mine = subprocess.run([*command, "0", str(tmp_path / "store")], capture_output=True, text=True, timeout=50)
    assert other.wait(timeout=10) == 3
    assert mine.returncode == 0, mine.stderr

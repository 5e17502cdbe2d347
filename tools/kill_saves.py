"""Kill a job that saves continuously, again and again, at random moments: python tools/kill_saves.py --n 1000

Each round starts two ranks that save checkpoints in the background as fast as they can, then ends one or both with
SIGKILL. Then the newest valid checkpoint is loaded, as on any restart, and every tensor is compared with what was saved
at its step. A checkpoint that was reported as written must not be lost. Prints one line; exits with 1 after any corrupt
load or lost checkpoint.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatrain.checkpoint.manifest import Identity, Progress, RunRecord
from megatrain.checkpoint.naming import checkpoint_step
from megatrain.checkpoint.piece import Piece
from megatrain.checkpoint.saver import Saver
from megatrain.checkpoint.store import CheckpointStore, load_into
from megatrain.config import CheckpointConfig
from megatrain.distributed.world import World
from megatrain.errors import CheckpointError

RANKS = 2
SHAPES = {"model.a": (333, 1001), "optim.exp_avg.a": (333, 1001), "model.b": (17,)}
LONGEST_S = 0.25
"""The longest time from the start of the first save to the kill, about ten times what one save takes."""


def value(step: int, name: str) -> torch.Tensor:
    """Return a tensor's content at a step: different for every step, tensor and element."""
    shape = SHAPES[name]
    return torch.arange(float(torch.Size(shape).numel())).view(shape) + 1e6 * (list(SHAPES).index(name) + 1) + step


def save_forever(folder: Path, rendezvous: Path, rank: int, written: int) -> None:
    """Run one rank: save step after step, and write to the pipe `written` which steps the saver reports as saved."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(rendezvous), RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=20),
    )
    world = World(rank, RANKS, rank, torch.device("cpu"), dist.new_group(backend="gloo"))
    store = CheckpointStore(folder, world)
    saver = Saver(store, CheckpointConfig(keep=3))
    found = store.newest_valid()
    step = (found[1].step if found else 0) + 1
    os.write(written, b"begin\n")
    while True:
        state: dict[str, torch.Tensor | Piece] = {}
        for name in SHAPES:
            flat = value(step, name).flatten()
            half = -(-flat.numel() // RANKS)
            part = flat[rank * half : (rank + 1) * half].clone()
            state[name] = Piece(part, rank * half, SHAPES[name])
        saver.save(state, RunRecord(Progress(step), identity=Identity({"note": "x" * 2000})))
        for kind, saved, _ in saver.reports():
            os.write(written, f"{kind} {saved}\n".encode())
        step += 1


def one_kill(folder: Path, chance: random.Random) -> tuple[int, int, bool]:
    """Start the ranks, kill them and load the newest checkpoint.

    Return its step, the newest step that was reported as saved, and whether a save was in progress.

    Raises:
        AssertionError: a checkpoint passes verification but differs from what was saved.
    """
    reader, written = os.pipe()
    with tempfile.TemporaryDirectory() as rendezvous:
        pids = []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                try:
                    save_forever(
                        folder, Path(rendezvous) / "store", rank, written if rank == 0 else os.open("/dev/null", 1)
                    )
                finally:
                    os._exit(1)  # a rank whose peer was killed ends here
            pids.append(pid)
        os.close(written)
        received = os.read(reader, 6)
        assert received == b"begin\n", received
        time.sleep(chance.uniform(0, LONGEST_S))
        first = chance.choice([[0], [1], [0, 1]])
        for rank in first:
            os.kill(pids[rank], signal.SIGKILL)
        time.sleep(chance.uniform(0, 0.02))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    with os.fdopen(reader) as pipe:
        reported = [int(line.split()[1]) for line in pipe.read().splitlines() if line.startswith("save ")]
    in_progress = any(path.name.endswith(".writing") for path in folder.iterdir())
    store = CheckpointStore(folder, World(0, 1, 0, torch.device("cpu"), None))
    found = store.newest_valid()
    if found is None:
        return 0, max(reported, default=0), in_progress
    path, manifest = found
    state = {name: torch.empty(shape) for name, shape in SHAPES.items()}
    load_into(path, manifest, state, None)
    for name, tensor in state.items():
        assert torch.equal(tensor, value(manifest.step, name)), f"{path}: {name} is not what was saved"
    assert checkpoint_step(path) == manifest.step
    return manifest.step, max(reported, default=0), in_progress


def main() -> int:
    """Run the kills and print the result; 1 if a checkpoint was corrupt or lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="kills")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random moments")
    parser.add_argument("--folder", type=Path, help="where to save; a temporary folder unless given")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder)) / "checkpoints"
    corrupt = lost = interrupted = 0
    started, step = time.monotonic(), 0
    try:
        for number in range(1, arguments.n + 1):
            try:
                step, reported, in_progress = one_kill(folder, chance)
                lost += step < reported
                interrupted += in_progress
            except (AssertionError, CheckpointError) as error:
                corrupt += 1
                print(f"kill {number}: {error}", file=sys.stderr)
            if sys.stderr.isatty() or number % 100 == 0:
                print(f"\r{number} of {arguments.n} kills", end="", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)
    print(
        f"\n{arguments.n} kills, {interrupted} of them while a save was in progress, {step} checkpoints, "
        f"{time.monotonic() - started:.0f} s: {corrupt} corrupt loads, {lost} written checkpoints lost"
    )
    return 1 if corrupt or lost else 0


if __name__ == "__main__":
    sys.exit(main())

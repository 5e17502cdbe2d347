"""Copies of the state in memory. The node's agent owns the memory, so copies survive the ranks.

Each node's agent keeps its own ranks' part (`own/step_<n>/`) and the previous node's (`peer/step_<n>/`) in /dev/shm, in
the checkpoint format. Ranks that restart within the job load their node's part. When the agents exit for good,
`rescue.py` writes the parts to the disk.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.checkpoint.manifest import MANIFEST, Manifest, NodePart, RunRecord
from megatrain.checkpoint.naming import checkpoint_name, checkpoint_step, list_checkpoints
from megatrain.checkpoint.piece import Piece
from megatrain.checkpoint.rescue import ENVIRONMENT, OWN, PEER
from megatrain.checkpoint.store import verify, write
from megatrain.distributed.world import World
from megatrain.errors import CheckpointError, EnvironmentFault

_LOG = logging.getLogger("megatrain")


class MemoryStore:
    """The copies of this rank's node. All ranks of the job must call its methods in the same order."""

    def __init__(self, folder: Path, world: World) -> None:
        """`folder` is the agent's. Messages use a separate process group, because a thread sends them (`saver.py`)."""
        self.folder = folder
        self.world = world.with_own_control_group()
        self.node = world.node_world()
        self.number = world.rank // world.local_size
        self.num_nodes = world.size // world.local_size

    @classmethod
    def from_environ(cls, world: World, environ: Mapping[str, str] | None = None) -> MemoryStore | None:
        """Return the store in the folder that this rank's agent provides; None if no agent provides one."""
        folder = (os.environ if environ is None else environ).get(ENVIRONMENT)
        return cls(Path(folder), world) if folder else None

    def save(self, state: dict[str, Tensor], record: RunRecord) -> int:
        """Save a copy; drop older ones once every node has its part; return this node's bytes.

        Raises:
            EnvironmentFault: on every rank, if the memory of any node is too small.
        """
        step = record.progress.step
        own, peer = (self.folder / kind / checkpoint_name(step) for kind in (OWN, PEER))
        part = replace(record, part=NodePart(self.number, self.num_nodes))
        self._together(lambda: self._recreate(own, peer))
        self._together(lambda: write(own, state, part, self.node, whole=False))
        if self.num_nodes > 1:
            self._exchange(own, peer)
        if self.node.is_main:
            self._drop(lambda other: other < step)
        return sum(path.stat().st_size for path in own.iterdir())

    def _recreate(self, *folders: Path) -> None:
        if self.node.is_main:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)

    def _together(self, act: Callable[[], None]) -> None:
        """Run `act` on every rank; raise EnvironmentFault on all ranks if it fails on any."""
        problem = None
        try:
            act()
        except (EnvironmentFault, OSError) as error:
            problem = str(error)
        if found := next(filter(None, self.world.all_gather_json(problem)), None):
            raise EnvironmentFault(found)

    def newest_valid(self, after: int) -> tuple[Path, Manifest] | None:
        """Return this node's part (and manifest) of the newest copy after step `after` that is valid on all nodes."""
        own_steps = [checkpoint_step(path) for path in list_checkpoints(self.folder / OWN)]
        by_rank = [set(steps) for steps in self.world.all_gather_json(own_steps)]
        for step in sorted(set.intersection(*by_rank) - set(range(after + 1)), reverse=True):
            folder = self.folder / OWN / checkpoint_name(step)
            try:
                manifest, problem = verify(folder, self.node, whole=False), None
            except CheckpointError as error:
                manifest, problem = Manifest(), str(error)
            if not any(problems := self.world.all_gather_json(problem)):
                return folder, manifest
            complete = all(self.world.all_gather_json(not self.node.is_main or (folder / MANIFEST).exists()))
            # A manifest is missing if the ranks were killed while they made the copy: incomplete, but not damaged.
            damaged = complete and self.world.is_main
            level = logging.WARNING if damaged else logging.INFO
            _LOG.log(level, "the copy of step %d is incomplete or damaged: %s", step, next(filter(None, problems)))
        return None

    def forget(self) -> None:
        """Remove all copies. Called when the run rolls back to an earlier step."""
        self.world.barrier()
        if self.node.is_main:
            self._drop(lambda step: True)

    def _drop(self, old: Callable[[int], bool]) -> None:
        for kind in (OWN, PEER):
            for folder in list_checkpoints(self.folder / kind):
                if old(checkpoint_step(folder) or 0):
                    shutil.rmtree(folder, ignore_errors=True)

    def _exchange(self, own: Path, peer: Path) -> None:
        """Send this rank's file to the same local rank on the next node; receive the one from the previous node.

        The node's first rank also sends the manifest.
        """
        world, local = self.world, self.world.local_size
        following, before = (world.rank + local) % world.size, (world.rank - local) % world.size
        names = [f"{world.local_rank}.safetensors", *([MANIFEST] if self.node.is_main else [])]
        sizes = torch.tensor([_size(own / name) for name in names])  # 0: this rank has no state, so no file
        coming = torch.empty_like(sizes)
        _wait_for(dist.isend(sizes, following, group=world.control), dist.irecv(coming, before, group=world.control))
        self._together(lambda: self._make_room(peer, names, coming.tolist()))
        waits = []
        for name, size, expected in zip(names, sizes.tolist(), coming.tolist(), strict=True):
            if size:
                waits.append(dist.isend(_bytes_of(own / name, size, shared=False), following, group=world.control))
            if expected:
                waits.append(dist.irecv(_bytes_of(peer / name, expected, shared=True), before, group=world.control))
        _wait_for(*waits)
        self.world.barrier()

    @staticmethod
    def _make_room(folder: Path, names: list[str], sizes: list[int]) -> None:
        for name, size in zip(names, sizes, strict=True):
            if size:
                with (folder / name).open("xb") as file:
                    # If memory is full, this raises OSError now instead of SIGBUS later.
                    os.posix_fallocate(file.fileno(), 0, size)


def check_covers(folder: Path, manifest: Manifest, state: dict[str, Tensor]) -> None:
    """Check that a node's part of a checkpoint contains all elements that this rank needs.

    Raises:
        CheckpointError: a tensor is incomplete. The message names the first.
    """
    for name, tensor in state.items():
        wanted = (
            [(o, s) for o, s, _ in tensor.parts] if isinstance(tensor, Piece) else [([0] * tensor.dim(), tensor.shape)]
        )
        chunks = manifest.tensors[name].chunks if name in manifest.tensors else []
        for offset, size in wanted:
            found = sum(_common(offset, size, chunk.offset, chunk.size) for chunk in chunks)
            if found != math.prod(size):
                raise CheckpointError(
                    f"{folder} holds only {found} of the {math.prod(size)} elements of {name} that this rank needs"
                )


def _common(offset: Sequence[int], size: Sequence[int], other_offset: Sequence[int], other_size: Sequence[int]) -> int:
    """Return the number of elements that are in both rectangles."""
    places = zip(offset, size, other_offset, other_size, strict=True)
    return math.prod(max(0, min(o + s, p + t) - max(o, p)) for o, s, p, t in places)


def _wait_for(*transfers: dist.Work | None) -> None:
    for transfer in transfers:
        if transfer is not None:
            transfer.wait()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bytes_of(path: Path, size: int, shared: bool) -> Tensor:
    """Map a file as a tensor of bytes; with `shared`, writes go to the file."""
    return torch.from_file(str(path), shared=shared, size=size, dtype=torch.uint8)

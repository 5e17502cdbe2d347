"""Write the in-memory copies of the state to the disk when the agents exit for good. Imports no torch.

Each agent copies its node's part (and, if another agent died, the previous node's part) to
`checkpoints/rescued/step_<n>/node_<k>/`. Once all parts exist they become a checkpoint: now if all agents are alive,
else at the next start.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatrain.checkpoint.manifest import (
    MANIFEST,
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    check_coverage,
    read_manifest,
    verify_file,
    write_manifest,
)
from megatrain.checkpoint.naming import TEMPORARY, checkpoint_step, list_checkpoints
from megatrain.errors import CheckpointError
from megatrain.resilience.atomic_file import sync_path

ENVIRONMENT = "MEGATRAIN_COPIES"
"""Environment variable that tells the workers the agent's folder for copies."""

OWN, PEER = "own", "peer"
RESCUED = "rescued"
_MEMORY = Path("/dev/shm")
_LOG = logging.getLogger("megatrain")


class Copies:
    """An agent's folder in memory. The agent removes it; if the agent was killed, the machine's next agent does."""

    def __init__(self) -> None:
        prefix = f"megatrain-{os.getuid()}-"
        memory = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        for leftover in memory.glob(f"{prefix}*"):
            with suppress(OSError):
                lock = _lock(leftover)
                shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)
        for tries_left in (3, 2, 1, 0):
            self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=memory))
            try:
                self._lock = _lock(self.folder)  # released when this process ends, even if killed
                for kind in (OWN, PEER):
                    (self.folder / kind).mkdir()
                break
            except OSError:  # another agent that is starting mistook it for a leftover and removed it
                if not tries_left:
                    raise

    def rescue(self, checkpoints: Path, alone: bool) -> list[int]:
        """Write copies that are newer than the newest checkpoint to the disk; return their steps.

        If `alone`, other agents have died, so the previous node's part is written too.

        Raises:
            OSError: the disk cannot be written.
        """
        on_disk = max((checkpoint_step(path) or 0 for path in list_checkpoints(checkpoints)), default=-1)
        steps = []
        for kind in (OWN, PEER) if alone else (OWN,):
            for part in list_checkpoints(self.folder / kind):
                step = checkpoint_step(part) or 0
                with suppress(CheckpointError):  # incomplete: a rank died while it made this copy
                    if step > on_disk and _write_part(part, checkpoints / RESCUED / part.name):
                        steps.append(step)
        return sorted(set(steps))

    def close(self) -> None:
        """Remove all copies."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _lock(folder: Path) -> int:
    """Lock a folder and return the file descriptor. Raises OSError if another process holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _write_part(part: Path, target: Path) -> bool:
    """Copy a node's part to the disk unless that was done before; return False if the part is damaged.

    Raises:
        CheckpointError: the part is incomplete.
    """
    manifest = read_manifest(part)
    if manifest.part is None:
        raise CheckpointError(f"{part} is a whole checkpoint, not a node's part of one")
    final = target / f"node_{manifest.part.node:05d}"
    if final.exists():
        return True
    target.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=target))
    try:
        for name in (*manifest.files, MANIFEST):
            shutil.copyfile(part / name, writing / name)
            with (writing / name).open("rb") as file:
                os.fsync(file.fileno())
        if problem := next(filter(None, (verify_file(writing, *one) for one in manifest.files.items())), None):
            _LOG.warning("the copy in memory is damaged: %s", problem)
            return False
        sync_path(writing)
        with suppress(OSError):  # another node has already written this part
            os.rename(writing, final)
        sync_path(target)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return True


def assemble(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Build the newest complete checkpoint from rescued parts, and remove all parts. The caller must own the run.

    Return its folder (or None) and problems with newer ones.
    """
    rescued = checkpoints / RESCUED
    made, problems = None, []
    newest = max((checkpoint_step(path) or 0 for path in list_checkpoints(checkpoints)), default=-1)
    for folder in list_checkpoints(rescued):
        if (checkpoint_step(folder) or 0) <= newest:
            break
        try:
            manifest = _merge(folder)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        writing = checkpoints / f"{folder.name}{TEMPORARY}"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        for path in _parts(folder):
            for name in read_manifest(path).files:
                # Links, so that the parts stay intact if this process is killed halfway.
                os.link(path / name, writing / _file_name(path, name))
        write_manifest(writing, manifest)
        made = checkpoints / folder.name
        os.rename(writing, made)
        sync_path(checkpoints)
        break
    shutil.rmtree(rescued, ignore_errors=True)
    return made, problems


def _merge(folder: Path) -> Manifest:
    """Merge the manifests of the parts in `folder` into the manifest of the whole checkpoint.

    Raises:
        CheckpointError: a part is missing or damaged.
    """
    parts: dict[Path, Manifest] = {path: read_manifest(path) for path in _parts(folder)}
    numbers: set[int] = set()
    for path, manifest in parts.items():
        if manifest.part is None:
            raise CheckpointError(f"{path} is a whole checkpoint, not a node's part of one")
        numbers.add(manifest.part.node)
    if not parts:
        raise CheckpointError(f"the copies of {folder.name} hold no node's part")
    first = next(iter(parts.values()))
    counts = sorted({manifest.part.num_nodes for manifest in parts.values() if manifest.part})
    if len(counts) > 1:
        raise CheckpointError(f"the copies of {folder.name} are of jobs with different numbers of nodes: {counts}")
    if missing := sorted(set(range(counts[0])) - numbers):
        listed = ", ".join(map(str, missing))
        raise CheckpointError(f"the copies of {folder.name} lack the parts of nodes {listed} (counted from 0)")
    files: dict[str, FileEntry] = {}
    chunks: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], Chunk]] = {}
    entries: dict[str, TensorEntry] = {}
    for path, manifest in parts.items():
        files |= {_file_name(path, name): file for name, file in manifest.files.items()}
        for name, tensor in manifest.tensors.items():
            entries.setdefault(name, tensor)
            held = chunks.setdefault(name, {})
            for chunk in tensor.chunks:  # several nodes may hold the same chunk
                held.setdefault((chunk.offset, chunk.size), chunk._replace(file=_file_name(path, chunk.file)))
    tensors = {name: replace(entry, chunks=list(chunks[name].values())) for name, entry in entries.items()}
    whole = replace(first, part=None, files=files, tensors=tensors)
    check_coverage(folder, whole)
    return whole


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("node_*"))


def _file_name(part: Path, name: str) -> str:
    return f"{part.name}_{name}"

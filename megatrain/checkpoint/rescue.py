"""Puts copies of the state that agents hold in memory on the disk, when the agents leave for good. Imports no torch.

Each agent brings its own node's part, and that of the node before it where an agent is gone, to
`checkpoints/rescued/step_<n>/node_<k>/`. Parts that make a whole become a checkpoint like any other: at once where all agents
are there, or else at the next start.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatrain.checkpoint.manifest import (
    MANIFEST,
    TEMPORARY,
    check_coverage,
    checkpoint_step,
    list_checkpoints,
    manifest_hash,
    read_manifest,
    sync_folder,
    verify_file,
    write_json,
)
from megatrain.errors import CheckpointError

ENVIRONMENT = "MEGATRAIN_COPIES"
"""The agent's folder for copies, in its workers' environment."""

OWN, PEER = "own", "peer"
NODE, NODES = "node", "num_nodes"
"""What a part's manifest keeps beside a checkpoint's: which node's part it is, of how many."""

RESCUED = "rescued"
_MEMORY = Path("/dev/shm")
_LOG = logging.getLogger("megatrain")


class Copies:
    """An agent's folder in memory. Gone with the agent; what one that was killed left, the next on the machine removes."""

    def __init__(self) -> None:
        mine = f"megatrain-{os.getuid()}-"
        memory = _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        for left in memory.glob(f"{mine}*"):
            with suppress(OSError):
                lock = _lock(left)
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        for tries_left in (3, 2, 1, 0):
            self.folder = Path(tempfile.mkdtemp(prefix=mine, dir=memory))
            try:
                self._lock = _lock(self.folder)  # held until this process ends, however it does
                for kind in (OWN, PEER):
                    (self.folder / kind).mkdir()
                break
            except OSError:  # another agent that starts now took it for one that was left
                if not tries_left:
                    raise

    def rescue(self, checkpoints: Path, alone: bool) -> list[int]:
        """Bring what is newer than the disk's newest checkpoint to the disk; the steps. `alone`: other agents are gone.

        Raises:
            OSError: the disk does not take it.
        """
        on_disk = max((checkpoint_step(path) or 0 for path in list_checkpoints(checkpoints)), default=-1)
        steps = []
        for kind in (OWN, PEER) if alone else (OWN,):
            for part in list_checkpoints(self.folder / kind):
                step = checkpoint_step(part) or 0
                with suppress(CheckpointError):  # a rank died while it made this one
                    if step > on_disk and _bring(part, checkpoints / RESCUED / part.name):
                        steps.append(step)
        return sorted(set(steps))

    def close(self) -> None:
        """Drop all copies."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _lock(folder: Path) -> int:
    """Mark a folder as in use. Raises OSError where it is by another process."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(number)
        raise
    return number


def _bring(part: Path, target: Path) -> bool:
    """Copy a node's part to the disk, unless it is there; False where the part is damaged. Raises CheckpointError where it
    never became one."""
    manifest = read_manifest(part)
    final = target / f"node_{manifest[NODE]:05d}"
    if final.exists():
        return True
    target.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=target))
    try:
        for name in (*manifest["files"], MANIFEST):
            shutil.copyfile(part / name, writing / name)
            with (writing / name).open("rb") as file:
                os.fsync(file.fileno())
        if problem := next(filter(None, (verify_file(writing, *one) for one in manifest["files"].items())), None):
            _LOG.warning("the copy in memory is damaged: %s", problem)
            return False
        sync_folder(writing)
        with suppress(OSError):  # another node was faster
            os.rename(writing, final)
        sync_folder(target)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return True


def assemble(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Make the newest checkpoint that the rescued parts hold whole; its folder (None: there is none) and what was wrong
    with newer ones. The caller owns the run; parts that are of no use are removed.
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
            for name in read_manifest(path)["files"]:
                os.link(path / name, writing / _file_name(path, name))  # a kill half-way leaves the parts as they are
        write_json(writing / MANIFEST, manifest)
        made = checkpoints / folder.name
        os.rename(writing, made)
        sync_folder(checkpoints)
        break
    shutil.rmtree(rescued, ignore_errors=True)
    return made, problems


def _merge(folder: Path) -> dict[str, Any]:
    """The manifest of the whole of which `folder` holds the parts. Raises CheckpointError where some are missing."""
    documents = {path: read_manifest(path) for path in _parts(folder)}
    for path, document in documents.items():
        if not {NODE, NODES} <= document.keys():
            raise CheckpointError(f"{path} is a checkpoint, and no node's part of one")
    there = {document[NODE] for document in documents.values()}
    first = next(iter(documents.values()), None)
    if first is None or there != set(range(first[NODES])):
        missing = sorted(set(range(first[NODES])) - there) if first else "every"
        raise CheckpointError(f"the copies of {folder.name} lack the part of node {missing} (counted from 0)")
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for path, document in documents.items():
        files |= {_file_name(path, name): recorded for name, recorded in document["files"].items()}
        for name, tensor in document["tensors"].items():
            merged = tensors.setdefault(name, {**tensor, "chunks": {}})
            for chunk in tensor["chunks"]:  # one of several nodes that hold it will do
                place = str((chunk["offset"], chunk["size"]))
                merged["chunks"].setdefault(place, {**chunk, "file": _file_name(path, chunk["file"])})
    for tensor in tensors.values():
        tensor["chunks"] = list(tensor["chunks"].values())
    whole = {name: value for name, value in first.items() if name not in (NODE, NODES, "checksum")}
    whole |= {"files": files, "tensors": tensors}
    check_coverage(folder, whole)
    whole["checksum"] = manifest_hash(whole)
    return whole


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("node_*"))


def _file_name(part: Path, name: str) -> str:
    return f"{part.name}_{name}"

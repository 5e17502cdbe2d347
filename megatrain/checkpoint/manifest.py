"""What makes a folder a checkpoint: its name, its JSON manifest, and the checksums that the manifest keeps. Imports no torch.

How tensors get into the files is `storage.py`'s; which checkpoints a run has and loads is `store.py`'s.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import xxhash

from megatrain.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TEMPORARY = ".writing"
"""Behind the name of a checkpoint that is not one yet, or no longer."""

HASH_BLOCK = 2**22
READ_BLOCK = 2**19
_NAME = re.compile(r"step_(\d{8,})$")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step`."""
    return f"step_{step:08d}"


def checkpoint_step(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None if it is not one."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's `checkpoints/` folder, newest first; unverified."""
    found = [path for path in folder.glob("step_*") if checkpoint_step(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: checkpoint_step(path) or 0, reverse=True)


def file_hash(path: Path) -> str:
    """xxh3-128 of a file, as 32 hex digits; reads it in blocks."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(READ_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename or a new file in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, document: Any) -> None:
    """Write standard JSON (NaN raises ValueError) under a temporary name, flush it and rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(document, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def manifest_hash(document: dict[str, Any]) -> str:
    """Checksum of a manifest: xxh3-128 of its canonical JSON without the checksum itself."""
    body = {name: value for name, value in document.items() if name != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, its own checksum verified.

    Raises:
        CheckpointError: missing, cut, altered, or of a format this version does not read.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); the checkpoint is damaged") from None
    if not isinstance(document, dict) or "format" not in document:
        raise CheckpointError(f"{path} is not a megatrain manifest")
    if document["format"] != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {document['format']}; this version reads format {FORMAT_VERSION}")
    if document.get("checksum") != manifest_hash(document):
        raise CheckpointError(f"{path} does not match its own checksum; it was altered or damaged")
    return document


def check_coverage(folder: Path, manifest: dict[str, Any], whole: bool = True) -> None:
    """Refuse a manifest whose chunks do not fill each tensor exactly once (torch checks this on save only), or where not
    `whole`, fill some of it twice."""
    for name, tensor in manifest["tensors"].items():
        shape, covered = tensor["shape"], 0
        for chunk in tensor["chunks"]:
            for offset, size, bound in zip(chunk["offset"], chunk["size"], shape, strict=True):
                if offset < 0 or size < 0 or offset + size > bound:
                    raise CheckpointError(f"{folder}: a chunk of {name} lies outside its shape {shape}")
            covered += math.prod(chunk["size"])
            if chunk["file"] not in manifest["files"]:
                raise CheckpointError(f"{folder}: {name} points to {chunk['file']}, which the manifest does not list")
        if whole and covered != math.prod(shape):
            raise CheckpointError(f"{folder}: {name} holds {covered} of its {math.prod(shape)} elements")
        if _overlap(tensor["chunks"]):
            raise CheckpointError(f"{folder}: chunks of {name} overlap, so some of its elements are missing")


def _overlap(chunks: list[dict[str, Any]]) -> bool:
    """Whether any two rectangles share an element. Sweeps along the first dimension, where few are open at a time."""
    boxes = sorted(
        (chunk["offset"], [o + s for o, s in zip(chunk["offset"], chunk["size"], strict=True)]) for chunk in chunks
    )
    open_boxes: list[tuple[list[int], list[int]]] = []
    for start, stop in boxes:
        open_boxes = [box for box in open_boxes if not start or box[1][0] > start[0]]
        for other_start, other_stop in open_boxes:
            if all(max(a, c) < min(b, d) for a, b, c, d in zip(start, stop, other_start, other_stop, strict=True)):
                return True
        open_boxes.append((start, stop))
    return False


def verify_file(folder: Path, name: str, recorded: dict[str, Any]) -> str | None:
    """What is wrong with one file of a checkpoint, or None if it is as it was written."""
    path = folder / name
    if Path(name).name != name:
        return f"{name}: not a plain file name"
    try:
        size = path.stat().st_size
        if size != recorded["size"]:
            return f"{path}: {size} bytes, {recorded['size']} were written"
        if file_hash(path) != recorded["xxh3"]:
            return f"{path}: its checksum differs from what was written"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None

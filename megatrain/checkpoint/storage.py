"""How torch's distributed checkpoint meets the disk: sharded safetensors, one file a rank, and a JSON manifest.

torch's own storage writes its metadata as a pickle; here nothing is ever unpickled. What a run keeps beside its tensors,
where checkpoints live and which one is used is `store.py`'s.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatrain.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_HASH_BLOCK = 2**22


@dataclass(frozen=True)
class WrittenFile:
    """A file of a checkpoint as its writer left it."""

    name: str
    size: int
    xxh3: str


def file_hash(path: Path) -> str:
    """xxh3-128 of a file, as 32 hex digits; reads it in blocks."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
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


def check_coverage(folder: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest whose chunks do not fill each tensor exactly once (torch checks this on save only)."""
    for name, tensor in manifest["tensors"].items():
        shape, covered = tensor["shape"], 0
        for chunk in tensor["chunks"]:
            for offset, size, bound in zip(chunk["offset"], chunk["size"], shape, strict=True):
                if offset < 0 or size < 0 or offset + size > bound:
                    raise CheckpointError(f"{folder}: a chunk of {name} lies outside its shape {shape}")
            covered += math.prod(chunk["size"])
            if chunk["file"] not in manifest["files"]:
                raise CheckpointError(f"{folder}: {name} points to {chunk['file']}, which the manifest does not list")
        if covered != math.prod(shape):
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


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> WrittenFile:
    """Write contiguous CPU tensors as a safetensors file, flushed to the disk.

    The library would make a second copy of everything and leave the checksum to another pass; here the tensors' own memory
    is written and hashed block by block. The layout (https://huggingface.co/docs/safetensors): the header's length as 8
    bytes, little-endian; the header as JSON, padded to 8 bytes; the tensors one after the other.
    """
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = xxhash.xxh3_128(), 0
    with path.open("xb", buffering=0) as file:
        parts = [memoryview(struct.pack("<Q", len(text)) + text), *map(_bytes, tensors.values())]
        for piece in parts:
            for start in range(0, len(piece), _HASH_BLOCK):
                block = piece[start : start + _HASH_BLOCK]
                digest.update(block)
                size += len(block)
                while block:  # a full disk may take a part of it
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    return WrittenFile(path.name, size, digest.hexdigest())


def _bytes(tensor: torch.Tensor) -> memoryview[int]:
    """A contiguous CPU tensor's own memory."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _entry(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


class SafetensorsWriter(FileSystemWriter):
    """Writes each rank's items into one safetensors file and, on the coordinator, the manifest."""

    def __init__(self, folder: Path, extra: dict[str, Any]) -> None:
        """`extra` holds the JSON values that the manifest keeps beside the tensors."""
        super().__init__(folder)
        self.folder = folder
        self.extra = extra

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part of the plan, flushed to the disk."""
        tensors = {}
        for item in plan.items:
            assert item.type != WriteItemType.BYTE_IO, f"{item.index.fqn} is not a tensor; it belongs into the manifest"
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor)
            tensors[_entry(item.index)] = tensor.detach().cpu().contiguous()
        results: list[WriteResult] = []
        if tensors:
            written = write_safetensors(self.folder / f"{plan.storage_data.prefix.strip('_')}.safetensors", tensors)
            results = [
                WriteResult(index=item.index, size_in_bytes=tensors[_entry(item.index)].nbytes, storage_data=written)
                for item in plan.items
            ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest; runs on the coordinator once every rank has written."""
        where = {
            (r.index.fqn, tuple(r.index.offset or ())): r.storage_data for rank_results in results for r in rank_results
        }
        files = {written.name: {"size": written.size, "xxh3": written.xxh3} for written in where.values()}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            tensors[name] = {
                "dtype": str(tensor.properties.dtype).removeprefix("torch."),
                "shape": list(tensor.size),
                "chunks": [
                    {"offset": list(c.offsets), "size": list(c.sizes), "file": where[name, tuple(c.offsets)].name}
                    for c in tensor.chunks
                ],
            }
        document = {"format": FORMAT_VERSION, **self.extra, "files": files, "tensors": tensors}
        document["checksum"] = manifest_hash(json.loads(json.dumps(document)))
        write_json(self.folder / MANIFEST, document)


class SafetensorsReader(FileSystemReader):
    """Reads a checkpoint that `SafetensorsWriter` wrote; the manifest is given, already verified."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(folder)
        self.folder = folder
        self.manifest = manifest

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """torch's metadata, rebuilt from the manifest."""
        tensors, files = {}, {}
        for name, tensor in self.manifest["tensors"].items():
            chunks = [ChunkStorageMetadata(torch.Size(c["offset"]), torch.Size(c["size"])) for c in tensor["chunks"]]
            properties = TensorProperties(dtype=_DTYPES[tensor["dtype"]])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
            for chunk in tensor["chunks"]:
                files[MetadataIndex(name, torch.Size(chunk["offset"]))] = chunk["file"]
        return Metadata(state_dict_metadata=dict(tensors), storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """Keep the chunk -> file table."""
        self.storage_data = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the overlapping rectangles of each file into the tensors being loaded."""
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index]].append(item)
        for name, items in by_file.items():
            path = self.folder / name
            try:
                with safe_open(str(path), framework="pt") as file:
                    for item in items:
                        window = tuple(
                            slice(offset, offset + length)
                            for offset, length in zip(item.storage_offsets, item.lengths, strict=True)
                        )
                        entry = _entry(item.storage_index)
                        stored = file.get_slice(entry)[window] if window else file.get_tensor(entry)
                        target = planner.resolve_tensor(item).detach()
                        target.copy_(stored)
                        planner.commit_tensor(item, target)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        future: Future[None] = Future()
        future.set_result(None)
        return future


def save_planner() -> DefaultSavePlanner:
    """The planner for flat states: a tensor that several ranks hold is written once."""
    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True)

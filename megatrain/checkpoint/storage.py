"""Storage for torch's distributed checkpoint: one safetensors file per rank, and the manifest.

torch's own storage pickles its metadata; this one pickles nothing. `store.py` decides where checkpoints go and which
one is loaded.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatrain.checkpoint.manifest import Chunk, FileEntry, Manifest, RunRecord, TensorEntry, write_manifest
from megatrain.errors import CheckpointError

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_TORCH_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _NAMES}
_READ_AT_ONCE = 2**24
_HASH_BLOCK = 2**22
_READERS = 4  # one reader is limited by page-cache copies and the latency of a shared file system


@dataclass(frozen=True)
class WrittenFile:
    """Name, size in bytes and xxh3-128 of a checkpoint file that was written."""

    name: str
    size: int
    xxh3: str


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> WrittenFile:
    """Write contiguous CPU tensors to a safetensors file and flush it to the disk."""
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_stream(path, described, tensors.values())


def write_stream(
    path: Path, described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[torch.Tensor]
) -> WrittenFile:
    """Write tensors to a safetensors file, one at a time, and flush it to the disk.

    `described` has the dtype and shape of each, in the order of `tensors`: contiguous, on the CPU, and made only when
    they are written.

    The safetensors library would copy everything and need a second pass for the checksum. This function writes and
    hashes the tensors' memory block by block. The format (https://huggingface.co/docs/safetensors) is: the header's
    length (8 bytes, little-endian), the header (JSON, padded to a multiple of 8 bytes), the tensors back to back.
    """
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in described.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = xxhash.xxh3_128(), 0
    with path.open("xb", buffering=0) as file:

        def write(piece: memoryview) -> None:
            nonlocal size
            for start in range(0, len(piece), _HASH_BLOCK):
                block = piece[start : start + _HASH_BLOCK]
                digest.update(block)
                size += len(block)
                while block:  # a write may be partial
                    block = block[file.write(block) :]

        write(memoryview(struct.pack("<Q", len(text)) + text))
        for (name, wanted), tensor in zip(described.items(), tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == wanted, f"{name} is not as described"
            write(_bytes(tensor))
        os.fsync(file.fileno())
    return WrittenFile(path.name, size, digest.hexdigest())


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file. Its data start `at` bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file; return its tensors by name.

    Raises:
        CheckpointError: the file cannot be read, or is not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        return {
            name: StoredTensor(_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_window(
    file: int, stored: StoredTensor, offsets: Sequence[int], lengths: Sequence[int], target: torch.Tensor
) -> None:
    """Read the window of a stored tensor that starts at `offsets` and has the sizes `lengths` into `target`.

    Read directly into the target if layouts match: mmap was three times slower because of page faults.

    Raises:
        OSError: the file cannot be read or ends early.
    """
    row = math.prod(stored.shape[1:])
    first, count = (offsets[0], lengths[0]) if stored.shape else (0, 1)
    whole_rows = tuple(lengths[1:]) == stored.shape[1:]
    alike = whole_rows and target.device.type == "cpu" and target.is_contiguous() and target.dtype == stored.dtype
    rows = target if alike else torch.empty((count, *stored.shape[1:]), dtype=stored.dtype)
    at, memory = stored.at + first * row * stored.dtype.itemsize, _bytes(rows)
    while memory:
        read = os.preadv(file, [memory[:_READ_AT_ONCE]], at)
        if not read:
            raise OSError(f"the file ends early, at byte {at}")
        at, memory = at + read, memory[read:]
    if not alike:
        inner = tuple(slice(o, o + n) for o, n in zip(offsets[1:], lengths[1:], strict=True))
        target.copy_(rows[(slice(None), *inner)].reshape(target.shape))


def _bytes(tensor: torch.Tensor) -> memoryview[int]:
    """Return the memory of a contiguous CPU tensor without copying."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _entry(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"


class SafetensorsWriter(FileSystemWriter):
    """Writer of one safetensors file per rank. The coordinator also writes the manifest."""

    def __init__(self, folder: Path, record: RunRecord) -> None:
        """`record` has the manifest's fields that do not describe tensors."""
        super().__init__(folder)
        self.folder = folder
        self.record = record

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part of the plan and flush it to the disk."""
        tensors = {}
        for item in plan.items:
            assert item.type != WriteItemType.BYTE_IO, f"{item.index.fqn} is not a tensor; it belongs in the manifest"
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
        """Write the manifest. Called on the coordinator after every rank has written its file."""
        where = {
            (r.index.fqn, tuple(r.index.offset or ())): r.storage_data for rank_results in results for r in rank_results
        }
        files = {written.name: FileEntry(written.size, written.xxh3) for written in where.values()}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = [
                Chunk(tuple(c.offsets), tuple(c.sizes), where[name, tuple(c.offsets)].name) for c in tensor.chunks
            ]
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            tensors[name] = TensorEntry(dtype, tuple(tensor.size), chunks)
        record = self.record
        manifest = Manifest(record.progress, record.counters, record.identity, record.part, files, tensors)
        write_manifest(self.folder, manifest)


class SafetensorsReader(FileSystemReader):
    """Reader of a checkpoint that `SafetensorsWriter` wrote and whose manifest was verified."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder)
        self.folder = folder
        self.manifest = manifest

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """Return torch's metadata, rebuilt from the manifest."""
        tensors, files = {}, {}
        for name, tensor in self.manifest.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.size)) for c in tensor.chunks]
            properties = TensorProperties(dtype=_TORCH_DTYPES[tensor.dtype])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
            for chunk in tensor.chunks:
                files[MetadataIndex(name, torch.Size(chunk.offset))] = chunk.file
        return Metadata(state_dict_metadata=dict(tensors), storage_data=files)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: Any, **_kwargs: Any) -> None:
        """Store the mapping from chunks to files."""
        self.storage_data = metadata.storage_data

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the overlapping rectangles of each file into the tensors being loaded."""
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index]].append(item)
        for name, items in by_file.items():
            path = self.folder / name
            try:
                self._read_file(path, items, planner)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(self, path: Path, items: list[ReadItem], planner: LoadPlanner) -> None:
        stored = read_header(path)

        def read(item: ReadItem) -> torch.Tensor:
            if (entry := _entry(item.storage_index)) not in stored:
                raise CheckpointError(f"{path} lacks {entry}, which the manifest places there")
            target = planner.resolve_tensor(item).detach()
            read_window(file.fileno(), stored[entry], item.storage_offsets, item.lengths, target)
            return target

        # A forked process rebuilds torch's pool on first use; concurrent first uses can fail ("Invalid thread pool!"),
        # so force it here.
        torch.set_num_threads(torch.get_num_threads())
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(_READERS) as pool:
            for item, target in zip(items, pool.map(read, items), strict=True):
                planner.commit_tensor(item, target)


def save_planner(whole: bool = True) -> DefaultSavePlanner:
    """Return a planner for flat states. If several ranks hold the same tensor, only one writes it.

    With `whole=False` the ranks together may hold only a part of the state.
    """
    planner = DefaultSavePlanner if whole else _PartPlanner
    return planner(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True)


class _PartPlanner(DefaultSavePlanner):
    """torch's planner without its check that the ranks' pieces cover every tensor."""

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(self._dedup_save_plans(all_plans))

"""Read and write a checkpoint's tensors one at a time, so that no more than one is in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.manifest import Chunk, FileEntry, Manifest, RunRecord, TensorEntry, write_manifest
from megatrain.checkpoint.storage import read_header, read_window, write_stream
from megatrain.errors import CheckpointError
from megatrain.resilience.atomic_file import remove_abandoned, sync_path, temporary_name

FILE = "0.safetensors"


class TensorReader:
    """Reads whole tensors of a verified checkpoint, each when it is asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._headers = {name: read_header(folder / name) for name in manifest.files if name.endswith(".safetensors")}

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in its stored dtype.

        Raises:
            CheckpointError: a file cannot be read, or the checkpoint has no such tensor.
        """
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        entry = self.manifest.tensors[name]
        tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for chunk in entry.chunks:
            stored = self._headers[chunk.file].get(f"{name}@{','.join(map(str, chunk.offset))}")
            if stored is None:
                raise CheckpointError(f"{self.folder / chunk.file} lacks {name}, which the manifest places there")
            window = tuple(slice(start, start + size) for start, size in zip(chunk.offset, chunk.size, strict=True))
            target = tensor[window] if window else tensor
            try:
                with (self.folder / chunk.file).open("rb", buffering=0) as file:
                    read_window(file.fileno(), stored, (0,) * len(chunk.size), chunk.size, target)
            except OSError as error:
                raise CheckpointError(f"{self.folder / chunk.file} cannot be read: {error}") from error
        return tensor


def write_checkpoint(
    out: Path,
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    record: RunRecord,
    prepare: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the checkpoint `out` atomically, from tensors that are made one at a time.

    `described` has their names, dtypes and shapes, in their order. `prepare` writes what else belongs into the folder.

    Raises:
        OSError: the disk cannot be written.
    """
    remove_abandoned(out.parent)
    partial = temporary_name(out)
    partial.mkdir(parents=True)
    try:
        prepare(partial)
        entries = {f"{name}@{','.join('0' * len(shape))}": (dtype, shape) for name, (dtype, shape) in described.items()}
        written = write_stream(partial / FILE, entries, tensors)
        listed = {
            name: TensorEntry(str(dtype).removeprefix("torch."), shape, [Chunk((0,) * len(shape), shape, written.name)])
            for name, (dtype, shape) in described.items()
        }
        files = {written.name: FileEntry(written.size, written.xxh3)}
        write_manifest(partial, Manifest(record.progress, record.counters, record.identity, record.part, files, listed))
        os.rename(partial, out)
        sync_path(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

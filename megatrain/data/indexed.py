"""Write, check and read Megatron-LM's `.bin/.idx` pairs, with `.loss` beside. No tokenizer, no card, no torch.

`.bin` holds the token ids of all documents, concatenated. `.idx` holds, little-endian: 9 bytes `MMIDIDX\\0\\0`; u64
version 1; u8 dtype code; u64 number of sequences; u64 number of document indices; int32 sequence lengths (tokens);
int64 byte offsets of the sequences in `.bin`; int64 document indices (first 0, last the number of sequences). Here each
document is written as one sequence. `.loss`, if there is one, has a byte for each token: bit 0 is set if it counts in
the loss as a label, bit 1 if it belongs to the rejected side of a preference pair, whose document has the chosen side
first.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import xxhash

from megatrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
BLOCK_BYTES = 64 * 2**20
"""Size of the blocks of a `.bin`, each of which has its own hash."""
COUNTS, REJECTED = 1, 2
"""Bits of a token's byte in the `.loss`."""
_STRIDE = 2**20  # index entries processed at once


def token_dtype(vocab_size: int) -> np.dtype:
    """Return Megatron-LM's dtype for token ids: uint16 for vocabularies below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def dtype_code(dtype: np.dtype) -> int:
    """Return the `.idx` code of a dtype."""
    return next(code for code, known in DTYPES.items() if np.dtype(known) == dtype)


class BlockHasher:
    """Computes the xxh3-64 (16 hex digits) of each 64 MiB block of a byte stream."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._hash = xxhash.xxh3_64()
        self._room = BLOCK_BYTES

    def update(self, data: memoryview) -> None:
        """Hash the stream's next bytes."""
        while len(data):
            piece, data = data[: self._room], data[self._room :]
            self._hash.update(piece)
            self._room -= len(piece)
            if self._room == 0:
                self._done.append(self._hash.hexdigest())
                self._hash.reset()
                self._room = BLOCK_BYTES

    def digests(self) -> list[str]:
        """Return the hashes of all blocks, including a last partial one."""
        return self._done + ([self._hash.hexdigest()] if self._room < BLOCK_BYTES else [])


class IndexedWriter:
    """Writes `<prefix>.bin` and, on `finish`, `<prefix>.idx`. Memory does not grow with the number of documents.

    `<prefix>.loss` is written if `add` is told which tokens count; `loss_blocks` has its hashes then.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self.bin_path, self.idx_path = pair(prefix)
        self.dtype = dtype
        self.num_documents = 0
        self.num_tokens = 0
        self.blocks = BlockHasher()
        self._lengths_path = prefix.with_name(prefix.name + ".lengths")
        self._bin: BinaryIO = open(self.bin_path, "wb")  # noqa: SIM115, closed by finish
        self._lengths: BinaryIO = open(self._lengths_path, "wb")  # noqa: SIM115
        self.loss_path = loss_file(prefix)
        self.loss_blocks: BlockHasher | None = None
        self._loss: BinaryIO | None = None

    def add(self, ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Append documents: their concatenated token ids, the number of ids in each, and which ids count (uint8)."""
        assert ids.dtype == self.dtype and int(lengths.sum()) == len(ids)
        if counts is not None:
            assert len(counts) == len(ids)
            self._add_counts(memoryview(counts.tobytes()))
        data = memoryview(ids.tobytes())
        self._bin.write(data)
        self.blocks.update(data)
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(ids)

    def _add_counts(self, data: memoryview) -> None:
        if self._loss is None or self.loss_blocks is None:
            self._loss, self.loss_blocks = open(self.loss_path, "wb"), BlockHasher()  # noqa: SIM115, closed by finish
        self._loss.write(data)
        self.loss_blocks.update(data)

    def finish(self) -> None:
        """Write the index and flush the files to disk."""
        self._lengths.close()
        if self._loss is not None:
            _flush(self._loss)
            self._loss.close()
        with open(self.idx_path, "wb") as idx:
            n = self.num_documents
            idx.write(HEADER.pack(MAGIC, 1, dtype_code(self.dtype), n, n + 1))
            for lengths in self._read_lengths():
                idx.write(lengths.tobytes())
            offset = 0
            for lengths in self._read_lengths():
                ends = offset + np.cumsum(lengths.astype(np.int64) * self.dtype.itemsize)
                idx.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
                offset = int(ends[-1])
            for start in range(0, n + 1, _STRIDE):
                idx.write(np.arange(start, min(start + _STRIDE, n + 1), dtype="<i8").tobytes())
            _flush(idx)
        self._lengths_path.unlink()
        _flush(self._bin)
        self._bin.close()

    def _read_lengths(self) -> Iterator[np.ndarray]:
        with open(self._lengths_path, "rb") as file:
            while data := file.read(4 * _STRIDE):
                yield np.frombuffer(data, dtype="<i4")

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._bin, self._lengths, self._loss):
            if file is not None:
                file.close()


@dataclass(frozen=True)
class IndexHeader:
    """The dtype and counts of an `.idx`."""

    dtype: np.dtype
    num_sequences: int
    num_documents: int
    num_tokens: int


def pair(prefix: Path) -> tuple[Path, Path]:
    """Return the `.bin` and `.idx` paths of a prefix, whose name may contain dots."""
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def loss_file(prefix: Path) -> Path:
    """Return the path of the file that says which tokens of a prefix count in the loss."""
    return prefix.with_name(prefix.name + ".loss")


def read_header(prefix: Path) -> IndexHeader:
    """Read an `.idx`'s header and check it against its `.bin`.

    Raises `DataError` if the file is not an index, is cut short, does not contain integer tokens, or describes more
    bytes than the `.bin` has.
    """
    bin_path, idx_path = pair(prefix)
    for path, partner in ((bin_path, idx_path), (idx_path, bin_path)):
        if path.is_symlink() and not path.exists():
            raise DataError(_moved(path))
        if not path.is_file():
            beside = f", but {partner} is there" if partner.is_file() else ""
            raise DataError(f"{path}: no such file{beside}; a dataset needs both its .bin and its .idx")
    size = idx_path.stat().st_size
    with open(idx_path, "rb") as file:
        head = file.read(HEADER.size)
        if len(head) < HEADER.size or head[:9] != MAGIC:
            raise DataError(f"{idx_path}: not a Megatron index (it does not start with MMIDIDX)")
        _, version, code, sequences, documents = HEADER.unpack(head)
        if version != 1 or code not in DTYPES:
            raise DataError(
                f"{idx_path}: index version {version}, dtype code {code}; version 1, codes 1 to 8 are known"
            )
        dtype = np.dtype(DTYPES[code])
        if dtype.kind == "f":
            raise DataError(f"{idx_path}: contains {dtype} values, not token ids")
        if size < HEADER.size + 12 * sequences + 8 * documents:
            raise DataError(f"{idx_path}: {size} bytes, cut short: its header announces {sequences} sequences")
        end = 0
        if sequences:
            file.seek(HEADER.size + 4 * (sequences - 1))
            (last_length,) = struct.unpack("<i", file.read(4))
            file.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
            (last_offset,) = struct.unpack("<q", file.read(8))
            end = last_offset + last_length * dtype.itemsize
    have = bin_path.stat().st_size
    if have < end:
        raise DataError(
            f"{bin_path}: {have} bytes, shorter than the {end} bytes its .idx says; copy or prepare it again"
        )
    return IndexHeader(dtype, sequences, max(documents - 1, 0), end // dtype.itemsize)


def _moved(link: Path) -> str:
    """Return the message for a link of an adopted dataset whose file is gone."""
    folder = link.parent
    return (
        f"{link}: links to {os.readlink(link)}, which is not there: moved, or its disk is not mounted; put it back, or "
        f"adopt it at its new place: megatrain prepare data=megatron data.dir={folder.parent} data.name={folder.name} "
        "'data.paths=[<new prefix>]' data.overwrite=true, with the tokenizer.* keys of the first time (unchanged files "
        "have the same fingerprint, so runs continue)"
    )


def hash_file(path: Path) -> str:
    """Return the xxh3-128 of a file, 32 hex digits."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while data := file.read(2**22):
            state.update(data)
    return state.hexdigest()


def hash_blocks(path: Path) -> list[str]:
    """Return the xxh3-64 of each 64 MiB block of a file."""
    hasher = BlockHasher()
    with open(path, "rb") as file:
        while data := file.read(2**22):
            hasher.update(memoryview(data))
    return hasher.digests()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

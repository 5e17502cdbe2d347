"""Read and verify prepared datasets: each block is hashed when it is first read, and again if its file changes.

Not here: the order of samples (order.py), batches (loader.py), writing (preparation.py). Imports no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import xxhash

from megatrain.data.card import Card, SplitCard, check_dataset, fingerprint
from megatrain.data.indexed import BLOCK_BYTES, HEADER, hash_blocks, hash_file, pair, read_header
from megatrain.errors import DataError, EnvironmentFault

_MAX_ATTEMPTS = 10
"""How often a read is attempted while the file keeps changing."""

_SETTLE_S = 1.0
"""Seconds from noticing a change to hashing. File times are set when a write begins, and accurate to about this."""

_MAX_OPEN = 64
"""Pairs of one split that are open at once; a process may often open no more than 1,024 files."""

_PIECE_BYTES = 4 * 2**20
_STRIDE = 2**18  # document lengths read at once


class IndexedDataset:
    """One split of a prepared dataset: a `Dataset` over `.bin` and `.idx` files. Open it with `IndexedDataset.open`.

    Files are read with `pread`, not mapped: touching a mapped file that was truncated kills the process (SIGBUS)
    without a message. If the file was written to or replaced, it is reopened and its blocks are hashed again before any
    of its data is used. Changes are detected by inode, size and times, which a network file system may report late (on
    NFS by up to `acregmax`, 60 s).
    """

    def __init__(self, folder: Path, split: str, card: Card, verify: bool) -> None:
        self.folder = folder
        self.split = split
        self.card = card
        self.split_card: SplitCard = card.splits[split]
        self.fingerprint: str = card.fingerprint
        self.num_tokens: int = self.split_card.tokens
        self.bin_path, self.idx_path = pair(folder / split)
        self._dtype = np.dtype(self.split_card.dtype)
        self._verifies = verify
        self._file = self._open()

    @staticmethod
    def open(folder: Path, split: str, verify: bool = True) -> IndexedDataset:
        """Open a split of the dataset in `folder`.

        With `verify`, each 64 MiB block is hashed when it is first read, and again if the file changes.

        Raises `ConfigError` if there is no dataset, `DataError` if it is damaged or has no such split.
        """
        return IndexedDataset.of_card(Path(folder), split, check_dataset(Path(folder)), verify)

    @staticmethod
    def of_card(folder: Path, split: str, card: Card, verify: bool = True) -> IndexedDataset:
        """Open a split of a dataset whose card `check_dataset` returned. Raises `DataError` if it has no such split."""
        if split not in card.splits:
            raise DataError(f"{folder}: has no {split} split; prepare it with data.heldout_fraction above 0")
        if not card.splits[split].tokens:
            raise DataError(f"{folder}: its {split} split is empty; prepare it from data that contains tokens")
        return (ChainedDataset if card.splits[split].parts else IndexedDataset)(folder, split, card, verify)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return token ids `[start, start + count)` as a new int64 array.

        Raises `DataError` if the file differs from what was prepared, `EnvironmentFault` if the system cannot read it.
        """
        assert start >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        itemsize = self._dtype.itemsize
        first, stop = start * itemsize, (start + count) * itemsize
        for _ in range(_MAX_ATTEMPTS):
            if self._file.raw.closed:
                self._resume()
            file = self._file  # another thread may reopen the file meanwhile
            for block in range(first // BLOCK_BYTES, -(-stop // BLOCK_BYTES)) if file.unverified else ():
                if block in file.unverified:
                    self._verify(file, block)
            data = self._bytes(file, first, stop)
            # checked after reading: a change before the read may become visible only now
            if not self._verifies or self._stamp() == file.stamp:
                return np.frombuffer(data, self._dtype).astype(np.int64)
            time.sleep(_SETTLE_S)
            self._file = self._open()
        raise DataError(
            f"{self.bin_path}: is being written to while bytes {first} to {stop} are read; stop the program that writes"
        )

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the token ids (int64) of each document, its end-of-document token included."""
        header = read_header(self.folder / self.split)
        start = 0
        with open(self.idx_path, "rb") as index:
            index.seek(HEADER.size)
            for first in range(0, header.num_sequences, _STRIDE):
                count = min(_STRIDE, header.num_sequences - first)
                lengths = np.fromfile(index, dtype="<i4", count=count)
                if len(lengths) < count:
                    raise DataError(f"{self.idx_path}: cut short at byte {HEADER.size + 4 * (first + len(lengths))}")
                for length in lengths:
                    if length < 0 or start + int(length) > self.num_tokens:
                        raise DataError(
                            f"{self.idx_path}: damaged: a document of {length} tokens starts at token {start} of "
                            f"{self.num_tokens}"
                        )
                    yield self.read(start, int(length))
                    start += int(length)

    @property
    def name(self) -> str:
        """Return the path of the `.bin`."""
        return str(self.bin_path)

    def place(self, token: int) -> str:
        """Return the token's offset in the `.bin`."""
        return f"byte {token * self._dtype.itemsize}"

    def pause(self) -> None:
        """Close the file until the next read."""
        self._file.raw.close()

    def _resume(self) -> None:
        """Open a closed file again. Blocks that were verified stay so unless it changed."""
        file = self._open()
        if file.stamp == self._file.stamp:
            file.unverified = self._file.unverified
        self._file = file

    def _open(self) -> _OpenFile:
        """Open the `.bin`, with no block verified yet. A file opened earlier closes once its last reader is done."""
        stamp = self._stamp()  # taken before opening, so that a change between the two is noticed later
        try:
            file = open(self.bin_path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._fault(error, 0) from error
        return _OpenFile(file, stamp, set(range(len(self.split_card.block_hashes))) if self._verifies else set())

    def _stamp(self) -> tuple[int, ...]:
        """Return file attributes that change if the file is written to or replaced."""
        try:
            status = os.stat(self.bin_path)
        except FileNotFoundError as error:
            raise DataError(f"{self.bin_path}: is gone; put it back, or prepare the dataset again") from error
        except OSError as error:
            raise self._fault(error, 0) from error
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _verify(self, file: _OpenFile, block: int) -> None:
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.split_card.bin_size)
        state = xxhash.xxh3_64()
        for piece in range(start, stop, _PIECE_BYTES):
            state.update(self._bytes(file, piece, min(piece + _PIECE_BYTES, stop)))
        if state.hexdigest() != self.split_card.block_hashes[block]:
            raise DataError(
                f"{self.bin_path}: bytes {start} to {stop} are not what was prepared (hash differs from the card's); "
                "copy or prepare the dataset again"
            )
        file.unverified.discard(block)

    def _bytes(self, file: _OpenFile, start: int, stop: int) -> bytes:
        """Return bytes `[start, stop)` of the `.bin`."""
        try:
            data = os.pread(file.raw.fileno(), stop - start, start)
            while len(data) < stop - start:
                more = os.pread(file.raw.fileno(), stop - start - len(data), start + len(data))
                if not more:
                    raise DataError(
                        f"{self.bin_path}: bytes {start} to {stop} cannot be read: it ends at byte "
                        f"{os.fstat(file.raw.fileno()).st_size}, but the card says {self.split_card.bin_size}: the "
                        "file was cut; copy or prepare the dataset again"
                    )
                data += more
        except OSError as error:
            raise self._fault(error, start) from error
        return data

    def _fault(self, error: OSError, start: int) -> EnvironmentFault:
        return EnvironmentFault(f"{self.bin_path}: cannot be read at byte {start} ({error.strerror})")


@dataclass
class _OpenFile:
    """An open `.bin`, its attributes when it was opened, and the blocks that have not been hashed yet."""

    raw: FileIO
    stamp: tuple[int, ...]
    unverified: set[int]

    def __del__(self) -> None:
        self.raw.close()


class ChainedDataset(IndexedDataset):
    """A split of several pairs, read one after another as one long sequence; at most `_MAX_OPEN` of them are open."""

    def __init__(self, folder: Path, split: str, card: Card, verify: bool) -> None:
        self.folder, self.split, self.card = folder, split, card
        self.split_card = card.splits[split]
        self.fingerprint = card.fingerprint
        self.num_tokens = self.split_card.tokens
        self._pairs = self.split_card.pairs(split)
        self._ends = np.cumsum([part.tokens for _, part in self._pairs])
        self._verifies = verify
        self._parts: dict[int, IndexedDataset] = {}
        self._in_use: list[int] = []  # those that are open, the latest last

    def read(self, start: int, count: int) -> np.ndarray:
        """Return token ids `[start, start + count)` as a new int64 array, across the ends of pairs."""
        assert start >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        pieces = [np.empty(0, np.int64)]
        while count:
            at, offset = self._locate(start)
            taken = min(count, int(self._ends[at]) - start)
            pieces.append(self._part(at).read(offset, taken))
            start, count = start + taken, count - taken
        return np.concatenate(pieces)

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the token ids (int64) of each document of each pair."""
        for at in range(len(self._pairs)):
            yield from self._part(at).documents()

    @property
    def name(self) -> str:
        """Return the dataset's folder and the split."""
        return f"{self.folder} ({self.split})"

    def place(self, token: int) -> str:
        """Return the token's offset in its `.bin`."""
        at, offset = self._locate(token)
        return f"{self._part(at).place(offset)} of {self._part(at).name}"

    def pause(self) -> None:
        """Close all pairs until they are read again."""
        while self._in_use:
            self._parts[self._in_use.pop()].pause()

    def _locate(self, token: int) -> tuple[int, int]:
        """Return the pair that holds a token, and the token's index in it."""
        at = int(np.searchsorted(self._ends, token, side="right"))
        return at, token - int(self._ends[at]) + self._pairs[at][1].tokens

    def _part(self, at: int) -> IndexedDataset:
        """Return a pair, and close the one that was used longest ago if too many are open."""
        if at not in self._in_use:
            if at not in self._parts:
                name, part = self._pairs[at]
                alone = Card(self.card.name, self.fingerprint, {name: part}, None)
                self._parts[at] = IndexedDataset(self.folder, name, alone, self._verifies)
            if len(self._in_use) >= _MAX_OPEN:
                self._parts[self._in_use.pop(0)].pause()
        else:
            self._in_use.remove(at)
        self._in_use.append(at)
        return self._parts[at]


def verify_dataset(folder: Path) -> None:
    """Verify every checksum of a prepared dataset, and its tokenizer.

    Raises `ConfigError` or `DataError` for the first mismatch with the card.
    """
    from megatrain.data.tokenizer_loading import load_tokenizer

    card = check_dataset(folder)
    for name, split in card.pairs():
        bin_path, idx_path = pair(folder / name)
        if hash_file(idx_path) != split.idx_hash:
            raise DataError(f"{idx_path}: its hash does not match the card's: the file was changed")
        for block, (found, expected) in enumerate(zip(hash_blocks(bin_path), split.block_hashes, strict=True)):
            if found != expected:
                raise DataError(f"{bin_path}: block at byte {block * BLOCK_BYTES} does not match the card's hash")
    assert card.fingerprint == fingerprint(card.splits)
    if card.tokenizer is not None:
        tokenizer = load_tokenizer(folder / "tokenizer")
        for name in ("fingerprint", "vocab_size", "end_of_document"):
            found, expected = getattr(tokenizer, name), getattr(card.tokenizer, name)
            if found != expected:
                raise DataError(
                    f"{folder / 'tokenizer'}: not the tokenizer that made this dataset: its {name} is {found}, "
                    f"the card's {expected}"
                )

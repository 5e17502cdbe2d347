"""Read a file of which every 64 MiB block has a known hash: a block is hashed when it is first read.

The file is read with `pread`, not mapped: touching a mapped file that was truncated kills the process (SIGBUS) without
a message. Imports no torch.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import xxhash

from megatrain.data.indexed import BLOCK_BYTES
from megatrain.errors import DataError, EnvironmentFault

_MAX_ATTEMPTS = 10
"""How often a read is attempted while the file keeps changing."""

_SETTLE_S = 1.0
"""Seconds from noticing a change to hashing. File times are set when a write begins, and accurate to about this."""

_PIECE_BYTES = 4 * 2**20


class VerifiedFile:
    """A file of `size` bytes whose 64 MiB blocks have the hashes `block_hashes` (xxh3-64, 16 hex digits).

    If the file was written to or replaced, it is reopened and its blocks are hashed again before any of its data is
    used. Changes are detected by inode, size and times, which a network file system may report late (on NFS by up to
    `acregmax`, 60 s). Without `verify` nothing is hashed. `remedy` ends messages about damage. May be used from several
    threads.
    """

    def __init__(self, path: Path, size: int, block_hashes: list[str], verify: bool, remedy: str) -> None:
        self.path = path
        self._size, self._hashes, self._verifies, self._remedy = size, block_hashes, verify, remedy
        self._file = self._open()

    @property
    def is_paused(self) -> bool:
        """Whether the file is closed until the next read."""
        return self._file.raw.closed

    def read(self, first: int, stop: int) -> bytes:
        """Return bytes `[first, stop)`.

        Raises `DataError` if the file differs from what its hashes say, `EnvironmentFault` if the system cannot read
        it.
        """
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
                return data
            time.sleep(_SETTLE_S)
            self._file = self._open()
        raise DataError(
            f"{self.path}: is being written to while bytes {first} to {stop} are read; stop the program that writes"
        )

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
        """Open the file, with no block verified yet. One opened earlier closes once its last reader is done."""
        stamp = self._stamp()  # taken before opening, so that a change between the two is noticed later
        try:
            file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._fault(error, 0) from error
        return _OpenFile(file, stamp, set(range(len(self._hashes))) if self._verifies else set())

    def _stamp(self) -> tuple[int, ...]:
        """Return file attributes that change if the file is written to or replaced."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: is gone; put it back, or prepare the dataset again") from error
        except OSError as error:
            raise self._fault(error, 0) from error
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _verify(self, file: _OpenFile, block: int) -> None:
        start = block * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self._size)
        state = xxhash.xxh3_64()
        for piece in range(start, stop, _PIECE_BYTES):
            state.update(self._bytes(file, piece, min(piece + _PIECE_BYTES, stop)))
        if state.hexdigest() != self._hashes[block]:
            raise DataError(
                f"{self.path}: bytes {start} to {stop} are not what was prepared (hash differs from the card's); "
                f"{self._remedy}"
            )
        file.unverified.discard(block)

    def _bytes(self, file: _OpenFile, start: int, stop: int) -> bytes:
        """Return bytes `[start, stop)` unverified."""
        try:
            data = os.pread(file.raw.fileno(), stop - start, start)
            while len(data) < stop - start:
                more = os.pread(file.raw.fileno(), stop - start - len(data), start + len(data))
                if not more:
                    raise DataError(
                        f"{self.path}: bytes {start} to {stop} cannot be read: it ends at byte "
                        f"{os.fstat(file.raw.fileno()).st_size}, but the card says {self._size}: the "
                        f"file was cut; {self._remedy}"
                    )
                data += more
        except OSError as error:
            raise self._fault(error, start) from error
        return data

    def _fault(self, error: OSError, start: int) -> EnvironmentFault:
        return EnvironmentFault(f"{self.path}: cannot be read at byte {start} ({error.strerror})")


@dataclass
class _OpenFile:
    """An open file, its attributes when it was opened, and the blocks that have not been hashed yet."""

    raw: FileIO
    stamp: tuple[int, ...]
    unverified: set[int]

    def __del__(self) -> None:
        self.raw.close()

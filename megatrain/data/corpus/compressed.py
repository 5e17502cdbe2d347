"""Read compressed files in bounded memory and detect damage. Does not interpret the contents."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
"""What reading a file that is cut short or damaged raises; bz2 raises an `OSError` without a number."""

_READ_BYTES = 256  # compressed bytes read at once: as few as 4 can decompress to a block of 128 KiB
_ARCHIVES = {
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xfd7zXZ\0": "an xz file",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
}
_TAR = (257, b"ustar")  # at this byte


def without_suffix(name: str) -> str:
    """Return a file's name in lower case, without the suffix of its compression."""
    name = name.lower()
    return next((name.removesuffix(packed) for packed in SUFFIXES if name.endswith(packed)), name)


def archive_kind(head: bytes) -> str | None:
    """Return what a file is if it begins as a compressed file or an archive does."""
    if head[_TAR[0] :].startswith(_TAR[1]):
        return "a tar archive"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return "a bzip2 file"
    return next((what for magic, what in _ARCHIVES.items() if head.startswith(magic)), None)


def opened(path: Path, raw: BinaryIO) -> BinaryIO:
    """Return a buffered reader that decompresses `raw` according to the suffix of `path`.

    Opening or reading raises one of `ERRORS`, or an `OSError` without a number, if the file is empty, cut short or
    damaged.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return raw
    if os.fstat(raw.fileno()).st_size == 0:  # most decompressors take it for a file of nothing
        raise EOFError("the compressed file has no bytes")
    return cast(BinaryIO, io.BufferedReader(_decompressor(suffix, raw), 2**17))


def _decompressor(suffix: str, raw: BinaryIO) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    return ZstdReader(raw)


class ZstdReader(io.RawIOBase):
    """Decompresses a zstd file of one or more frames. Unlike the library's own stream, it detects a truncated file."""

    def __init__(self, raw: BinaryIO) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._raw = raw
        self._frame: Any = None  # decompressor of the current frame
        self._rest = b""  # compressed bytes after the frame that has just ended
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` and return the number of bytes, 0 at the end. Raises `EOFError` if the file is damaged."""
        while not self._ready:
            data = self._rest or self._raw.read(_READ_BYTES)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the zstd file ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

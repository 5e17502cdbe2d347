"""Read compressed files in bounded memory and detect damage. Does not interpret the contents."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
"""What reading a file that is cut short or damaged raises."""

_READ_BYTES = 256  # compressed bytes read at once: as few as 4 can decompress to a block of 128 KiB
_PIECE = 2**17  # bytes
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

    Opening or reading raises one of `ERRORS` if the file is empty, cut short or damaged.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return raw
    if os.fstat(raw.fileno()).st_size == 0:  # most decompressors take it for a file of nothing
        raise EOFError("the compressed file has no bytes")
    reader: Any = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else _Streams(raw, _FORMATS[suffix])
    return cast(BinaryIO, io.BufferedReader(reader, _PIECE))


@dataclass(frozen=True)
class _Format:
    """How a format's streams are decompressed, several of which may follow one another in a file.

    `decompress` takes a stream's decompressor and some bytes and returns about `_PIECE` bytes at most. With `padding`
    there may be zeros after a stream.
    """

    name: str
    start: Callable[[], Any]
    decompress: Callable[[Any, bytes], bytes]
    padding: bool = False


_FORMATS = {
    ".zst": _Format(
        "zstd",
        zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj,
        lambda stream, data: stream.decompress(data),
    ),
    ".bz2": _Format("bzip2", bz2.BZ2Decompressor, lambda stream, data: stream.decompress(data, _PIECE)),
    ".xz": _Format(
        "xz", partial(lzma.LZMADecompressor, lzma.FORMAT_XZ), lambda stream, data: stream.decompress(data, _PIECE), True
    ),
}


class _Streams(io.RawIOBase):
    """Decompresses a file stream by stream. Unlike the libraries' own readers, it stops at nothing silently.

    Those of bz2 and lzma take a damaged stream, or what follows padding, for the end of the file; zstandard's does not
    notice that a file is cut.
    """

    def __init__(self, raw: BinaryIO, kind: _Format) -> None:
        self._raw, self._kind = raw, kind
        self._stream: Any = None  # decompressor of the current stream
        self._rest = b""  # compressed bytes after the stream that has just ended
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` and return the number of bytes, 0 at the end. Raises `EOFError` if the file is damaged."""
        while not self._ready:
            data = b""
            if self._stream is None or getattr(self._stream, "needs_input", True):
                data = self._rest or self._raw.read(_READ_BYTES)
                self._rest = b""
                if not data and self._stream is None:
                    return 0
                if not data:
                    raise EOFError(f"the {self._kind.name} file ends inside a stream")
            if self._stream is None:
                if self._kind.padding and not (data := data.lstrip(b"\0")):
                    continue
                self._stream = self._kind.start()
            try:
                self._ready = memoryview(self._kind.decompress(self._stream, data))
            except (OSError, lzma.LZMAError, zstandard.ZstdError) as error:
                raise EOFError(str(error)) from error
            if self._stream.eof:
                self._rest, self._stream = self._stream.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

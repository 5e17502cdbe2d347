"""Read compressed files in bounded memory and detect damage. Does not interpret the contents."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

_READ_BYTES = 256  # compressed bytes read at once: as few as 4 can decompress to a block of 128 KiB


def opened(path: Path, raw: BinaryIO) -> BinaryIO:
    """Return a buffered reader that decompresses `raw` according to the suffix of `path`.

    Reading raises `EOFError` if the file is cut short or a `.zst` is damaged, `zlib.error` or `gzip.BadGzipFile` if a
    `.gz` is damaged.
    """
    if path.name.lower().endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**17))
    if path.name.lower().endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(ZstdReader(raw), 2**17))
    return raw


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

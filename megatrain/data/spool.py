"""The spool: clean text on its way from the source to the tokenizer, compressed, on disk beside the dataset to be.

The corpus is read once however it is tokenized later; a frame holds one chunk of documents and is read back alone. One
byte a document says what becomes of it. Nothing here is kept once the dataset is finished.
"""

from __future__ import annotations

import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zstandard

DROPPED, TRAIN, HELDOUT = 0, 1, 2
_FRAME = struct.Struct("<QQQ")


@dataclass(frozen=True)
class Frame:
    """Where a frame lies in the spool (bytes) and how many documents it holds."""

    offset: int
    size: int
    documents: int


def pack(texts: list[bytes]) -> bytes:
    """A frame of documents: their number, their sizes and their bytes, compressed."""
    sizes = np.array([len(texts), *map(len, texts)], dtype="<u8").tobytes()
    return zstandard.ZstdCompressor(level=1).compress(sizes + b"".join(texts))


def unpack(spool: Path, frame: Frame) -> list[bytes]:
    """The documents of a frame."""
    with open(spool, "rb") as file:
        file.seek(frame.offset)
        data = zstandard.ZstdDecompressor().decompress(file.read(frame.size))
    sizes = np.frombuffer(data, dtype="<u8", count=1 + frame.documents)[1:]
    ends = np.cumsum(sizes, dtype=np.int64) + 8 * (1 + frame.documents)
    return [data[int(end) - int(size) : int(end)] for end, size in zip(ends, sizes)]


class Spool:
    """Frames, and a flag for each document, in files of a folder: memory does not grow with the corpus."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "spool.zst"
        self._data = open(self.path, "wb")
        self._index = open(folder / "spool.frames", "w+b")
        self._flags = open(folder / "spool.flags", "w+b")
        self.documents = 0
        self.text_bytes = 0

    def add(self, frame: bytes, flags: bytes, text_bytes: int) -> Frame:
        """Append a frame and the flags of its documents."""
        place = Frame(self._data.tell(), len(frame), len(flags))
        self._data.write(frame)
        self._index.write(_FRAME.pack(place.offset, place.size, place.documents))
        self._flags.write(flags)
        self.documents += len(flags)
        self.text_bytes += text_bytes
        return place

    def set_flag(self, document: int, flag: int) -> None:
        """Change the flag of the document of this number (from 0, over all frames)."""
        self._flags.seek(document)
        self._flags.write(bytes([flag]))
        self._flags.seek(0, 2)

    def frames(self) -> Iterator[tuple[Frame, bytes]]:
        """All frames with their flags, in order."""
        for file in (self._data, self._index, self._flags):
            file.flush()
        with open(self._index.name, "rb") as index, open(self._flags.name, "rb") as flags:
            while entry := index.read(_FRAME.size):
                frame = Frame(*_FRAME.unpack(entry))
                yield frame, flags.read(frame.documents)

    def close(self) -> None:
        """Close the files and remove them."""
        for file in (self._data, self._index, self._flags):
            file.close()
            Path(file.name).unlink(missing_ok=True)


class Seen:
    """The set of document hashes met so far, in a SQLite file with a 64 MiB cache: 16 bytes a document and a little more,
    on disk; memory does not grow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536", "locking_mode=EXCLUSIVE"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def add(self, digest: bytes) -> bool:
        """Add a hash; False if it was there already."""
        return self._db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        """Close and remove the file."""
        self._db.close()
        self._path.unlink(missing_ok=True)

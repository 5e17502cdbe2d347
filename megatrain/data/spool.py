"""The spool: clean text, compressed on disk, between reading the source and encoding it.

The source is read only once. A frame contains one chunk of documents and can be read on its own. A flag of one byte per
document names its split or marks it as dropped. The spool is deleted when the dataset is finished.
"""

from __future__ import annotations

import heapq
import itertools
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from megatrain.data.tokenizer import segments

DROPPED, TRAIN, HELDOUT = 0, 1, 2
_FRAME = struct.Struct("<QQQ")


@dataclass(frozen=True, order=True)
class Frame:
    """A frame's byte offset and size in the spool, and its number of documents."""

    offset: int
    size: int
    documents: int


def pack(texts: list[bytes]) -> bytes:
    """Compress documents into a frame: their number, their sizes and their bytes."""
    sizes = np.array([len(texts), *map(len, texts)], dtype="<u8").tobytes()
    return zlib.compress(sizes + b"".join(texts), 1)


def unpack(spool: Path, frame: Frame) -> list[bytes]:
    """Return the documents of a frame."""
    with open(spool, "rb") as file:
        file.seek(frame.offset)
        data = zlib.decompress(file.read(frame.size))
    sizes = np.frombuffer(data, dtype="<u8", count=1 + frame.documents)[1:]
    ends = np.cumsum(sizes, dtype=np.int64) + 8 * (1 + frame.documents)
    return [data[int(end) - int(size) : int(end)] for end, size in zip(ends, sizes, strict=True)]


class Spool:
    """Frames and a flag per document, stored in files, so memory does not grow with the corpus."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "spool.z"
        self._data = open(self.path, "wb")  # noqa: SIM115, closed by close
        self._index = open(folder / "spool.frames", "w+b")  # noqa: SIM115
        self._flags = open(folder / "spool.flags", "w+b")  # noqa: SIM115
        self.documents = 0
        self.text_bytes = 0

    def add(self, frame: bytes, flags: bytes, text_bytes: int) -> Frame:
        """Append a frame and the flags of its documents, and return its place."""
        added = Frame(self._data.tell(), len(frame), len(flags))
        self._data.write(frame)
        self._index.write(_FRAME.pack(added.offset, added.size, added.documents))
        self._flags.write(flags)
        self.documents += len(flags)
        self.text_bytes += text_bytes
        return added

    def set_flag(self, document: int, flag: int) -> None:
        """Change a document's flag; documents are numbered from 0 over all frames."""
        self._flags.seek(document)
        self._flags.write(bytes([flag]))
        self._flags.seek(0, 2)

    def frames(self) -> Iterator[tuple[Frame, bytes]]:
        """Yield all frames with their flags, in order."""
        self.flush()
        with open(self._index.name, "rb") as index, open(self._flags.name, "rb") as flags:
            while entry := index.read(_FRAME.size):
                frame = Frame(*_FRAME.unpack(entry))
                yield frame, flags.read(frame.documents)

    def flush(self) -> None:
        """Flush the files, so that everything added can be read."""
        for file in (self._data, self._index, self._flags):
            file.flush()

    def locate(self, document: int) -> tuple[Frame, int]:
        """Return the frame that contains a document, and the document's index in it."""
        for frame, _ in self.frames():
            if document < frame.documents:
                return frame, document
            document -= frame.documents
        raise IndexError(document)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files and remove them."""
        for file in (self._data, self._index, self._flags):
            file.close()
            Path(file.name).unlink(missing_ok=True)


class Sample:
    """A random sample of documents to train the tokenizer on: those with the smallest draws, up to `budget` bytes.

    The result does not depend on the order in which documents are offered.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._heap: list[tuple[int, int, Frame, int]] = []  # (-draw, bytes, frame, index in it)
        self._bytes = 0

    def offer(self, draw: int, size: int, frame: Frame, index: int) -> None:
        """Add a document of `size` bytes if its draw is small enough, and remove those that no longer fit."""
        if self._bytes >= self.budget and draw >= -self._heap[0][0]:
            return
        heapq.heappush(self._heap, (-draw, size, frame, index))
        self._bytes += size
        while self._bytes - self._heap[0][1] >= self.budget:
            self._bytes -= heapq.heappop(self._heap)[1]

    def forget(self, frame: Frame, index: int) -> None:
        """Remove a document, unless it is the only one."""
        others = [entry for entry in self._heap if entry[2:] != (frame, index)]
        if others:
            heapq.heapify(others)
            self._heap, self._bytes = others, sum(entry[1] for entry in others)

    def texts(self, spool: Spool) -> Iterator[str]:
        """Yield the documents in corpus order, cut into segments, until `budget` bytes are reached."""
        spool.flush()
        left = self.budget
        chosen = sorted(((frame.offset, index, frame) for _, _, frame, index in self._heap), key=lambda item: item[:2])
        for _, group in itertools.groupby(chosen, key=lambda item: item[0]):
            members = list(group)
            documents = unpack(spool.path, members[0][2])
            for _, index, _ in members:
                for segment in segments(documents[index].decode()):
                    if left > 0:
                        left -= len(segment.encode())
                        yield segment


class Seen:
    """The set of document hashes so far, in a SQLite file with a 64 MiB cache.

    It takes a little more than 16 bytes per document on disk; memory does not grow.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536", "locking_mode=EXCLUSIVE"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def add(self, digest: bytes) -> bool:
        """Add a hash and return whether it is new."""
        return self._db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        """Close and delete the file."""
        self._db.close()
        self._path.unlink(missing_ok=True)

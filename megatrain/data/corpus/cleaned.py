"""Cleaned shards on disk: compressed frames of documents, what is known of each document, and a marker.

A shard is `<key>.text` (frames), `<key>.documents` (a `DOCUMENT` each) and `<key>.json`, which is written last and has
the checksums of the others: a shard without it was interrupted. With `clean.dedup=minhash` there is `<key>.signatures`
too, one MinHash signature a document; with `data.write_text` there are `<key>.about` and `<key>.removed`, compressed
lines on each document and on each record that is none. The key is a hash of all that determines the content,
so a shard can be used again by whatever preparation needs the same.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from megatrain.data.corpus.part_files import PartFiles
from megatrain.data.corpus.recipe import StepReport, add_reports
from megatrain.data.indexed import hash_file
from megatrain.resilience.atomic_file import write_atomically

DOCUMENT = np.dtype([("hash", "<u8", (2,)), ("heldout_draw", "<u8"), ("sample_draw", "<u8"), ("size", "<u8")])
"""What is known of a document: the xxh3-128 of its text, two random numbers that depend on text and seed alone (they
decide what is held out and what the tokenizer is trained on), and its size in bytes of UTF-8."""

SIGNATURE = np.dtype("<u4")
"""A hash of a document's signature."""

_LEVEL = 1


@dataclass(frozen=True, order=True)
class Frame:
    """A frame's byte offset and size in `.text`, and its number of documents. It can be read on its own."""

    offset: int
    size: int
    documents: int


def describe(texts: list[bytes], seed: int, draw_by: list[bytes] | None = None) -> np.ndarray:
    """Return a `DOCUMENT` for each text, with the draws of the texts `draw_by`, or its own.

    An augmented text has the draws of its original, so that both are held out or neither is.
    """
    documents = np.zeros(len(texts), DOCUMENT)
    digests = [xxhash.xxh3_128_digest(text) for text in texts]
    documents["hash"] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    if draw_by is not None:
        digests = [xxhash.xxh3_128_digest(text) for text in draw_by]
    for name, purpose in (("heldout_draw", b"heldout"), ("sample_draw", b"sample")):
        documents[name] = [xxhash.xxh3_64_intdigest(purpose + digest, seed=seed) for digest in digests]
    documents["size"] = [len(text) for text in texts]
    return documents


def pack(texts: list[bytes]) -> bytes:
    """Compress documents into a frame: their number, their sizes and their bytes."""
    sizes = np.array([len(texts), *map(len, texts)], dtype="<u8").tobytes()
    return zstandard.ZstdCompressor(level=_LEVEL).compress(sizes + b"".join(texts))


def unpack(path: Path, frame: Frame) -> list[bytes]:
    """Return the documents of a frame of a `.text` file."""
    with open(path, "rb") as file:
        file.seek(frame.offset)
        return unpack_frame(file.read(frame.size), frame.documents)


def unpack_frame(packed: bytes, documents: int) -> list[bytes]:
    """Return the documents of a frame: the inverse of `pack`."""
    data = zstandard.ZstdDecompressor().decompress(packed)
    sizes = np.frombuffer(data, dtype="<u8", count=1 + documents)[1:]
    ends = np.cumsum(sizes, dtype=np.int64) + 8 * (1 + documents)
    return [data[int(end) - int(size) : int(end)] for end, size in zip(ends, sizes, strict=True)]


def pack_lines(lines: list[bytes]) -> bytes:
    """Compress lines into a frame; frames can follow one another."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(b"".join(lines)) if lines else b""


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))


class CleanedShard:
    """A finished cleaned shard, opened by its marker."""

    def __init__(self, folder: Path, key: str) -> None:
        self.key = key
        self.text_path, self._documents_path = folder / f"{key}.text", folder / f"{key}.documents"
        content = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        self.frames = [Frame(*frame) for frame in content["frames"]]
        self.counts: dict[str, int] = content["counts"]
        self.first_bad: str | None = content["first_bad"]
        self.quarantine_path = folder / f"{key}.quarantine"
        self.signatures_path = folder / f"{key}.signatures"
        self._reports_path = folder / f"{key}.reports"
        self.signing: dict[str, Any] | None = content["signing"]
        self.num_documents: int = content["documents"]
        self.text_bytes: int = content["text_bytes"]
        self.gone: list[int] = content["gone"]
        """Of a shard without repeated passages: documents of the cleaned shard of which nothing was left."""
        self._hashes: dict[str, str] = content["hashes"]

    @staticmethod
    def find(folder: Path, key: str) -> CleanedShard | None:
        """Return the shard if it is finished and its files are what was written."""
        try:
            shard = CleanedShard(folder, key)
            return shard if shard.is_whole() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_whole(self) -> bool:
        """Return whether its files are what was written. Raises `OSError` if one cannot be read."""
        folder = self.text_path.parent
        return all(hash_file(folder / name) == digest for name, digest in self._hashes.items())

    def reports(self) -> list[StepReport]:
        """Read what each step of the recipe did; the examples would fill the memory if every shard kept its own."""
        content = json.loads(self._reports_path.read_text(encoding="utf-8"))
        return [StepReport(**report) for report in content]

    def documents(self) -> np.ndarray:
        """Return a `DOCUMENT` for each document, mapped from the file."""
        if not self.num_documents:  # an empty file cannot be mapped
            return np.zeros(0, DOCUMENT)
        return np.memmap(self._documents_path, DOCUMENT, "r")

    def signatures(self) -> np.ndarray:
        """Return the signature of each document, `[documents, hashes]`, mapped from the file."""
        assert self.signing
        shape = self.num_documents, int(self.signing["hashes"])
        if not self.num_documents:
            return np.zeros(shape, SIGNATURE)
        return np.memmap(self.signatures_path, SIGNATURE, "r", shape=shape)

    def about(self) -> Iterator[bytes]:
        """Yield the line on each document, if they were kept."""
        return _lines(self.text_path.with_suffix(".about"))

    def removed(self) -> Iterator[bytes]:
        """Yield the line on each record that is no document, if they were kept."""
        return _lines(self.text_path.with_suffix(".removed"))

    def locate(self, document: int) -> tuple[Frame, int]:
        """Return the frame that holds a document, and the document's index in it."""
        for frame in self.frames:
            if document < frame.documents:
                return frame, document
            document -= frame.documents
        raise IndexError(document)


class CleanedShardWriter:
    """Writes a cleaned shard; it exists once `finish` has been called. A killed writer's files are overwritten.

    `signing` says how the documents' signatures are made, None if they have none; `lines` are kept of the documents and
    of what was removed if asked.
    """

    def __init__(self, folder: Path, key: str, signing: dict[str, Any] | None = None, lines: bool = False) -> None:
        self._folder, self._key, self._signing, self._with_lines = folder, key, signing, lines
        self._files = PartFiles(folder, key)
        also = [*(["signatures"] if signing else []), *(["about", "removed"] if lines else [])]
        for ending in ("text", "documents", *also):
            self._files[ending].write(b"")  # also if there are no documents
        self.gone: list[int] = []
        self._frames: list[Frame] = []
        self._text_bytes = 0
        self._counts: Counter[str] = Counter()
        self._reports: list[StepReport] = []
        self._first_bad: str | None = None

    def add(self, frame: bytes, documents: np.ndarray, signatures: np.ndarray | None = None) -> None:
        """Append documents: `pack` of their texts, `describe` of them, and their signatures."""
        self._frames.append(Frame(self._files["text"].tell(), len(frame), len(documents)))
        self._files["text"].write(frame)
        self._files["documents"].write(documents.tobytes())
        if self._signing:
            assert signatures is not None and signatures.dtype == SIGNATURE
            self._files["signatures"].write(signatures.tobytes())
        self._text_bytes += int(documents["size"].sum())

    def add_lines(self, about: bytes, removed: bytes) -> None:
        """Append `pack_lines` of lines on documents and on what was removed, if they are kept."""
        if self._with_lines:
            self._files["about"].write(about)
            self._files["removed"].write(removed)

    def count(
        self, counts: dict[str, int], reports: list[StepReport], first_bad: str | None, quarantine: bytes
    ) -> None:
        """Add counts, what the steps did, the first bad record if there was none yet, and lines of the quarantine."""
        self._counts.update(counts)
        if self._reports:
            add_reports(self._reports, reports)
        else:
            self._reports = reports
        self._first_bad = self._first_bad or first_bad
        if quarantine:
            self._files["quarantine"].write(quarantine)

    def finish(self) -> CleanedShard:
        """Write the marker and return the shard."""
        self._files["reports"].write(json.dumps([asdict(report) for report in self._reports]).encode())
        content: dict[str, Any] = {
            "frames": [(frame.offset, frame.size, frame.documents) for frame in self._frames],
            "documents": sum(frame.documents for frame in self._frames),
            "text_bytes": self._text_bytes,
            "counts": dict(self._counts),
            "first_bad": self._first_bad,
            "signing": self._signing,
            "gone": self.gone,
            "hashes": self._files.finish(),
        }
        write_atomically(self._folder / f"{self._key}.json", json.dumps(content) + "\n")
        return CleanedShard(self._folder, self._key)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

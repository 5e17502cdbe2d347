"""The cleaned text as files of its own (`data.write_text`): JSON lines of what is kept, and of what is not and why.

Each cleaned shard makes one file of each kind, a stream of zstandard, so files do not depend on how work was divided.
Cleaning leaves what is written here beside the clean text: `About` each document, and a `removed_line` for the others.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatrain.data.corpus.cleaned import CleanedShard, unpack
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.part_files import PartFiles
from megatrain.data.corpus.selection import DROPPED, NEAR_DUPLICATE
from megatrain.data.indexed import hash_file
from megatrain.resilience.atomic_file import write_atomically

TEXT, REMOVED = "text", "removed"
"""The folders of a dataset with the documents that are kept, and with those that are not."""

_LEVEL = 3
_DROPPED_BY = {DROPPED: "exact_duplicate", NEAR_DUPLICATE: "near_duplicate"}


def about_line(document: Document) -> bytes:
    """Return what goes along with a document's text, as a line of JSON: id, source and metadata without nulls."""
    metadata = {name: value for name, value in document.metadata.items() if value is not None}
    if document.language:
        metadata["language"] = document.language
    return _line({"id": document.id, "source": document.source, "metadata": metadata})


def removed_line(identity: str, source: str, step: str, reason: str, detail: str | None = None) -> bytes:
    """Return why a record is not in the corpus, as a line of JSON."""
    found = {"id": identity, "source": source, "step": step, "reason": reason}
    return _line(found | ({"detail": detail} if detail else {}))


def _line(content: dict[str, Any]) -> bytes:
    # a lone surrogate, as JSON can spell it, has no UTF-8: it is spelled again
    text = json.dumps(content, ensure_ascii=False, default=str)
    return text.encode(errors="backslashreplace") + b"\n"


@dataclass(frozen=True)
class TextTask:
    """A cleaned shard and the flags of its documents, and the name of its part in `folder`.

    `whole` is the shard without repeated passages, or the same one, and `whole_flags` are those of its documents: it
    has those of the cleaned shard that are kept, but for its `gone`.
    """

    shard: CleanedShard
    flags: bytes
    whole: CleanedShard
    whole_flags: bytes
    folder: Path
    key: str


class TextPart:
    """A shard's finished files, opened by their marker: `<key>.text` and `<key>.removed`, each only if it has lines."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self.key = folder, key
        content = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        self._hashes: dict[str, str] = content["hashes"]

    @staticmethod
    def find(folder: Path, key: str) -> TextPart | None:
        """Return the part if it is finished and its files are what was written."""
        try:
            part = TextPart(folder, key)
            whole = all(hash_file(folder / name) == digest for name, digest in part._hashes.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return part if whole else None

    def place(self, kind: str, folder: Path, number: int) -> None:
        """Put the file of a kind, if there is one, into a dataset's folder."""
        name = f"{self.key}.{kind}"
        if name in self._hashes:
            (folder / kind).mkdir(exist_ok=True)
            target = folder / kind / f"{number:05d}.jsonl.zst"
            try:
                os.link(self._folder / name, target)
            except OSError:  # a file system without links
                shutil.copyfile(self._folder / name, target)


def write_text(task: TextTask) -> int:
    """Write the files of a shard, and return the bytes of its text without repeated passages."""
    shard, files = task.shard, PartFiles(task.folder, task.key)
    with ExitStack() as stack:
        lines = {kind: _Lines(files, kind, stack) for kind in (TEXT, REMOVED)}
        for line in shard.removed():
            lines[REMOVED].write(line)
        gone, is_cut = set(task.whole.gone), task.whole.key != shard.key
        texts = zip(task.whole_flags, _texts(task.whole), strict=True)
        for number, (flag, about) in enumerate(zip(task.flags, shard.about(), strict=True)):
            known, reason, text = json.loads(about), _DROPPED_BY.get(flag), b""
            if not is_cut or (reason is None and number not in gone):
                flag, text = next(texts)
                reason = _DROPPED_BY.get(flag)
            elif reason is None:
                reason = "nothing_left"
            if reason:
                lines[REMOVED].write(removed_line(known["id"], known["source"], "dedup", reason))
            else:
                found = {"id": known["id"], "source": known["source"], "text": text.decode()}
                lines[TEXT].write(_line(found | {"metadata": known["metadata"]}))
    write_atomically(task.folder / f"{task.key}.json", json.dumps({"hashes": files.finish()}) + "\n")
    return task.whole.text_bytes


def _texts(shard: CleanedShard) -> Iterator[bytes]:
    for frame in shard.frames:
        yield from unpack(shard.text_path, frame)


class _Lines:
    """A compressed file of lines, made with the first."""

    def __init__(self, files: PartFiles, kind: str, stack: ExitStack) -> None:
        self._files, self._kind, self._stack = files, kind, stack
        self._stream: BinaryIO | None = None

    def write(self, line: bytes) -> None:
        """Append a line."""
        if self._stream is None:
            compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
            self._stream = self._stack.enter_context(compressor.stream_writer(self._files[self._kind], closefd=False))
        self._stream.write(line)

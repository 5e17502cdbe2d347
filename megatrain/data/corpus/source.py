"""What a source of documents is: shards in a fixed order, and the raw records of each. Cleans nothing.

A source is opened, and its paths checked, before any expensive work. Documents come in the same order on every machine.
Nothing here keeps more than one document in memory.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from megatrain.config import DataConfig
from megatrain.data.corpus.record import Problem, Record, identity
from megatrain.data.corpus.shard import Shard
from megatrain.errors import DataError, EnvironmentFault, how_to_install


@dataclass
class Progress:
    """Bytes read from the source so far (as stored, maybe compressed)."""

    bytes: int = 0


class Source(ABC):
    """A source of documents.

    Two sources are the same if their `identity` is equal. `total_bytes` is what `progress.bytes` will be at the end,
    None if unknown.
    """

    identity: dict[str, Any]
    total_bytes: int | None

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.progress = Progress()

    @abstractmethod
    def shards(self) -> Iterator[Shard]:
        """Yield the parts of the source in a fixed order, which its files alone decide."""

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[Record]:
        """Yield the documents of a shard in a fixed order."""

    def notes(self) -> Iterator[str]:
        """Yield what the user should know before the source is read."""
        yield from ()

    def write_beside(self, folder: Path) -> list[Path]:
        """Write what belongs to the dataset besides its text into its new folder; return the files (mostly none)."""
        del folder
        return []

    def records(self) -> Iterator[Record]:
        """Yield all documents in a fixed order."""
        for shard in self.shards():
            yield from self.read(shard)

    def too_long(self, where: str) -> Record:
        """Apply `data.oversized` to a document or line longer than `data.max_document_bytes`."""
        if self.config.oversized == "refuse":
            raise DataError(
                f"{where}: longer than data.max_document_bytes={self.config.max_document_bytes}; "
                "raise it, split the document, or set data.oversized=skip"
            )
        return Record(b"", where, oversized=True)

    def bounded(self, text: bytes | str, where: str, **about: Any) -> Iterator[Record]:
        """Yield a text as one document, unless it is too long. `about` has further fields of the record."""
        if num_bytes(text) > self.config.max_document_bytes:
            yield replace(self.too_long(where), **about)
        else:
            yield Record(text, where, **about)

    def field(
        self, value: str | bytes | Problem, where: str, whole: Any, kind: str | None, fields: dict[str, Any]
    ) -> Iterator[Record]:
        """Yield the text of a row, or the row `whole` with its problem. `fields` are its other columns to keep."""
        own, source, metadata = identity(fields)
        if isinstance(value, Problem):
            yield Record(json.dumps(whole, default=str), where, problem=value, id=own, source=source)
        else:
            yield from self.bounded(value, where, kind=kind, id=own, source=source, metadata=metadata)

    def whole_file(self, file: BinaryIO, path: Path, **about: Any) -> Iterator[Record]:
        """Yield an open file as one document; its path is its id, and in its metadata."""
        about["id"] = str(path)
        about["metadata"] = {"path": str(path)} | about.get("metadata", {})
        yield from self.bounded(file.read(self.config.max_document_bytes + 1), str(path), **about)


def num_bytes(text: bytes | str) -> int:
    """Return the size of a text in UTF-8."""
    return len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode(errors="surrogatepass"))


def require_library(name: str, what: str, extra: str = "data") -> Any:
    """Import an optional library, which `extra` installs. Raises `EnvironmentFault` if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentFault(f"{what} needs the library {name}: {how_to_install(extra)} ({error})") from error

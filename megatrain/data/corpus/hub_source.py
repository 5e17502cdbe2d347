"""Datasets of the Hugging Face hub, streamed, and local folders in their format."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from megatrain.config import DataConfig
from megatrain.data.corpus.conversations import FIELDS, find_conversation
from megatrain.data.corpus.decoding import find_text
from megatrain.data.corpus.file_search import saved_to_disk
from megatrain.data.corpus.record import METADATA, Problem, Record
from megatrain.data.corpus.shard import Shard
from megatrain.data.corpus.source import Source, num_bytes, require_library
from megatrain.data.hub import one_line_a_wait
from megatrain.errors import ConfigError, DataError, EnvironmentFault

_DATA_SUFFIXES = (".jsonl", ".parquet", ".csv", ".arrow")  # not those that descriptions have too
_ROWS = 100_000
"""Rows of a part of a folder written by `save_to_disk`; other datasets are read file by file."""


class HuggingFaceSource(Source):
    """A streamed dataset from the Hugging Face hub, or from a local folder in its format, one document per row."""

    total_bytes = None

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        if not config.hf_path:
            raise ConfigError("data.hf_path: missing; give a hub name such as allenai/c4, or a local folder")
        self.identity = {
            "kind": config.kind,
            "path": config.hf_path,
            "config": config.hf_config,
            "split": config.hf_split,
        }
        self._is_folder = Path(str(config.hf_path)).expanduser().is_dir()
        self._unread: list[Path] = []
        self._datasets = require_library("datasets", "data.kind=huggingface")
        place = f"data.hf_path={config.hf_path}, data.hf_config={config.hf_config}, data.hf_split={config.hf_split}"
        try:
            with one_line_a_wait(f"data.hf_path={config.hf_path}"):
                self._rows, self._revision = self._load(config)
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{place}: {_first_line(error)}") from error
        except (ConnectionError, OSError) as error:
            raise EnvironmentFault(
                f"{place}: the hub could not be reached ({_first_line(error)}); check the network, or give a folder "
                "with the dataset's files"
            ) from error
        columns = self._rows.column_names
        if columns is not None and not {config.text_column, config.text_column.split(".")[0], *FIELDS} & set(columns):
            raise ConfigError(f"data.text_column={config.text_column}: {config.hf_path} has {', '.join(columns)}")

    def _load(self, config: DataConfig) -> tuple[Any, str]:
        """Return the rows of the hub's dataset, of a folder in its format, or of a folder written by `save_to_disk`.

        With them comes what identifies their contents: the hub's commit, or the times of a folder's files.
        """
        folder = Path(str(config.hf_path)).expanduser()
        if not saved_to_disk(folder):
            builder = self._datasets.load_dataset_builder(config.hf_path, config.hf_config)
            by_split = builder.config.data_files or {}
            if self._is_folder:
                self._unread = _unread(folder, {str(file) for files in by_split.values() for file in files})
            files = by_split.get(config.hf_split)
            origins = getattr(files, "origin_metadata", [])
            revision = xxhash.xxh3_128_hexdigest(repr(origins).encode())
            return builder.as_streaming_dataset(split=config.hf_split), revision
        rows = self._datasets.load_from_disk(str(folder))
        if isinstance(rows, dict):
            if config.hf_split not in rows:
                raise ValueError(f"Unknown split {config.hf_split!r}; the folder has {', '.join(rows)}")
            rows = rows[config.hf_split]
        return rows.to_iterable_dataset(num_shards=max(1, len(rows) // _ROWS)), str(rows._fingerprint)

    def notes(self) -> Iterator[str]:
        """Yield how many data files of a local folder are not read: the library reads those of one format."""
        if self._unread:
            yield (
                f"data.hf_path={self.config.hf_path}: data files are not read ({len(self._unread):,}), such as "
                f"{self._unread[0].name}: of a folder without a description the library reads the files of one format; "
                "data=files with this folder in data.paths reads all"
            )

    def shards(self) -> Iterator[Shard]:
        """Yield each of the dataset's files, or of parts of so many rows of a folder written by `save_to_disk`."""
        number = self._rows.num_shards
        for index in range(number):
            yield Shard(stamps=(self._revision, f"part {index + 1} of {number}"), start=index)

    def read(self, shard: Shard) -> Iterator[Record]:
        """Yield the rows. Raises `DataError` for a bad row, `EnvironmentFault` if the connection is lost."""
        column, count = self.config.text_column, self._rows.num_shards
        path = str(self.config.hf_path) + (f", part {shard.start + 1} of {count}" if count > 1 else "")
        rows = self._rows.shard(num_shards=count, index=shard.start)
        number = 0
        try:
            with one_line_a_wait(f"data.hf_path={self.config.hf_path}"):
                for number, row in enumerate(rows, start=1):
                    text = find_text(row, column)
                    self.progress.bytes += 0 if isinstance(text, Problem) else num_bytes(text)
                    kind = None if find_conversation(row, column) is None else "conversation"
                    metadata = {name: row[name] for name in METADATA if name in row and name != column}
                    for record in self.field(text, f"{path}, row {number}", row, kind, metadata):
                        yield record.within(str(self.config.hf_path), shard.start, number)
        except (ConnectionError, TimeoutError) as error:
            raise EnvironmentFault(f"{path}: connection lost after row {number} ({_first_line(error)})") from error
        except (OSError, EOFError, zlib.error, ValueError, self._datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"{path}: cannot be read after row {number} ({_first_line(error)}); {self._remedy()}"
            ) from error

    def _remedy(self) -> str:
        """Return what helps with a file that the library cannot parse: it gives none of the rows around the bad one."""
        what = "this folder" if self._is_folder else "the downloaded files (hf download --repo-type dataset)"
        files = f"data=files with {what} in data.paths"
        if self.config.on_bad_record == "stop":
            return f"{files} names the file and line"
        key = f"data.on_bad_record={self.config.on_bad_record}"
        return f"{key} applies to rows that the library can parse; {files} reads on"


def _unread(folder: Path, read: set[str]) -> list[Path]:
    """Return the data files of a folder that are not among those that are read, sorted."""
    real = {os.path.realpath(path) for path in read}
    found = (path for path in folder.rglob("*") if path.suffix in _DATA_SUFFIXES and path.is_file())
    return sorted(path for path in found if os.path.realpath(path) not in real)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

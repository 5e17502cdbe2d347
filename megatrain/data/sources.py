"""Sources of documents: the standard library, files, Hugging Face datasets. Yield raw records, clean nothing.

A source is opened, and its paths checked, before any expensive work. Documents come in the same order on every machine.
Nothing here keeps more than one document in memory.
"""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import os
import platform
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from megatrain.config import DataConfig
from megatrain.data.compressed import opened
from megatrain.data.file_formats import TextColumn, json_values, starts_with_a_line
from megatrain.data.file_search import find_paths, saved_to_disk
from megatrain.data.hub import one_line_a_wait
from megatrain.data.normalise import Problem, Record, find_text
from megatrain.errors import ConfigError, DataError, EnvironmentFault


@dataclass
class Progress:
    """Bytes read from the source so far (as stored, maybe compressed), and number of documents skipped as too long."""

    bytes: int = 0
    oversized: int = 0


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
    def records(self) -> Iterator[Record]:
        """Yield the documents in a fixed order."""

    def _too_long(self, where: str) -> None:
        """Apply `data.oversized` to a document or line longer than `data.max_document_bytes`."""
        if self.config.oversized == "refuse":
            raise DataError(
                f"{where}: longer than data.max_document_bytes={self.config.max_document_bytes}; "
                "raise it, split the document, or set data.oversized=skip"
            )
        self.progress.oversized += 1

    def _bounded(self, text: bytes | str, where: str) -> Iterator[Record]:
        if _num_bytes(text) > self.config.max_document_bytes:
            self._too_long(where)
        else:
            yield Record(text, where)

    def _field(self, value: str | bytes | Problem, where: str, whole: Any) -> Iterator[Record]:
        """Yield the text of a record's field, or the record `whole` with its problem."""
        if isinstance(value, Problem):
            yield Record(json.dumps(whole, default=str), where, problem=value)
        else:
            yield from self._bounded(value, where)

    def _whole_file(self, path: Path) -> Iterator[Record]:
        limit = self.config.max_document_bytes
        with open(path, "rb") as raw, opened(path, raw) as file:
            data = file.read(limit + 1)
        self.progress.bytes += path.stat().st_size
        if len(data) > limit:
            self._too_long(str(path))
        else:
            yield Record(data, str(path))


def _num_bytes(text: bytes | str) -> int:
    """Return the size of a text in UTF-8."""
    return len(text) if isinstance(text, bytes) or text.isascii() else len(text.encode(errors="surrogatepass"))


# ---------------------------------------------------------------------------------------------------- standard library

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_OPTIONAL_PACKAGES = {"idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip", "venv"}


class StdlibSource(Source):
    """The `.py` files of the running Python's standard library, one document per file.

    To give the same files on every machine with the same Python version, it leaves out tests, installed packages, parts
    that Linux distributions package separately, and files generated for one platform.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self.files = sorted(self._find(), key=lambda path: path.relative_to(self.root).as_posix())
        if not self.files:
            raise DataError(f"data=python_stdlib: no .py files in {self.root}; use data=files")
        self.total_bytes = sum(path.stat().st_size for path in self.files)
        self.identity = {"kind": config.kind, "python": platform.python_version()}

    def _find(self) -> Iterator[Path]:
        for folder, folders, names in os.walk(self.root):
            top = Path(folder) == self.root
            folders[:] = [
                name
                for name in folders
                if name not in _SKIPPED_FOLDERS
                and not (top and (name in _OPTIONAL_PACKAGES or name.startswith("config-")))
            ]
            for name in names:
                path = Path(folder, name)
                generated = top and (name.startswith("_sysconfig") or name in ("sitecustomize.py", "usercustomize.py"))
                if name.endswith(".py") and not generated and path.is_file():
                    yield path

    def records(self) -> Iterator[Record]:
        """Yield the files, sorted by path."""
        for path in self.files:
            yield from self._whole_file(path)


# ---------------------------------------------------------------------------------------------------- files

_PLAIN, _LINES = (".txt", ".md"), (".jsonl", ".ndjson", ".json")
SUFFIXES = (*(f"{kind}{packed}" for kind in (*_PLAIN, *_LINES) for packed in ("", ".gz", ".zst")), ".parquet")


class FilesSource(Source):
    """Files that `data.paths` matches, sorted by path.

    A document is a `.txt` or `.md` file, a line of `.jsonl` or `.ndjson` or a row of `.parquet`. A `.json` has lines
    like a `.jsonl`, or is one array of objects, or one object.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.files = find_paths(config.paths, SUFFIXES)
        self.total_bytes = sum(path.stat().st_size for path in self.files)
        self.identity = {
            "kind": config.kind,
            "files": len(self.files),
            "bytes": self.total_bytes,
            "listing": _listing_hash(self.files),
        }

    def records(self) -> Iterator[Record]:
        """Yield the documents of each file in turn. Raises `DataError` if a file is damaged or cannot be read."""
        for path in self.files:
            before = self.progress.bytes
            try:
                yield from self._read(path)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"{path}: cut short or damaged ({error}); download or compress it again") from error
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
            self.progress.bytes = before + path.stat().st_size

    def _read(self, path: Path) -> Iterator[Record]:
        name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
        if name.endswith(_PLAIN):
            return self._whole_file(path)
        if name.endswith(".parquet"):
            return self._parquet(path)
        return self._json(path, any_layout=name.endswith(".json"))

    def _json(self, path: Path, any_layout: bool) -> Iterator[Record]:
        before = self.progress.bytes
        with open(path, "rb", buffering=2**20) as raw, opened(path, raw) as file:
            in_lines = not any_layout or starts_with_a_line(file)
            for record in self._lines(path, file) if in_lines else self._values(path, file):
                yield record
                self.progress.bytes = before + raw.tell()

    def _lines(self, path: Path, file: BinaryIO) -> Iterator[Record]:
        """Yield the lines of a `.jsonl`, with at most `data.max_document_bytes` in memory."""
        limit = self.config.max_document_bytes
        for number in itertools.count(1):
            line = file.readline(limit + 2)
            if not line:
                return
            where = f"{path}:{number}"
            if len(line.rstrip(b"\r\n")) > limit:
                self._too_long(where)
                while line and not line.endswith(b"\n"):
                    line = file.readline(2**20)
            elif line.strip():
                yield Record(line, where, json=True)

    def _values(self, path: Path, file: BinaryIO) -> Iterator[Record]:
        """Yield the objects of a `.json` that is not one object a line."""
        for number, text in enumerate(json_values(file, str(path), self.config.max_document_bytes), start=1):
            yield Record(text, f"{path}, record {number}", json=True)

    def _parquet(self, path: Path) -> Iterator[Record]:
        pyarrow = require_library("pyarrow", ".parquet")
        import pyarrow.parquet as parquet

        before = self.progress.bytes
        try:
            with parquet.ParquetFile(path) as file:
                column = TextColumn(file.schema_arrow, self.config.text_column, str(path))
                row, rows = 0, max(file.metadata.num_rows, 1)
                null = Problem("null", f"no text under {self.config.text_column!r}: it is null")
                for batch in file.iter_batches(64, columns=None if column.problem else [self.config.text_column]):
                    for value in batch.to_pylist() if column.problem else column.texts(batch):
                        row += 1
                        yield from self._field(
                            column.problem or (null if value is None else value), f"{path}:{row}", value
                        )
                    self.progress.bytes = before + path.stat().st_size * row // rows
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: cut short or damaged ({error}); download it again") from error


def _listing_hash(files: list[Path]) -> str:
    """Return the xxh3-128 of all names, sizes and modification times, which detects edits without reading the files."""
    digest = xxhash.xxh3_128()
    for path in files:
        entry = path.stat()
        digest.update(f"{path.name}\0{entry.st_size}\0{entry.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------- Hugging Face


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
        self._datasets = require_library("datasets", "data.kind=huggingface")
        place = f"data.hf_path={config.hf_path}, data.hf_config={config.hf_config}, data.hf_split={config.hf_split}"
        try:
            with one_line_a_wait(f"data.hf_path={config.hf_path}"):
                self._rows = self._load(config)
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{place}: {_first_line(error)}") from error
        except (ConnectionError, OSError) as error:
            raise EnvironmentFault(
                f"{place}: the hub could not be reached ({_first_line(error)}); check the network, or give a folder "
                "with the dataset's files"
            ) from error
        columns = self._rows.column_names
        if columns is not None and not {config.text_column, config.text_column.split(".")[0]} & set(columns):
            raise ConfigError(f"data.text_column={config.text_column}: {config.hf_path} has {', '.join(columns)}")

    def _load(self, config: DataConfig) -> Any:
        """Return the rows of the hub's dataset, of a folder in its format, or of a folder written by `save_to_disk`."""
        folder = Path(str(config.hf_path)).expanduser()
        if not saved_to_disk(folder):
            return self._datasets.load_dataset(config.hf_path, config.hf_config, split=config.hf_split, streaming=True)
        rows = self._datasets.load_from_disk(str(folder))
        if isinstance(rows, dict):
            if config.hf_split not in rows:
                raise ValueError(f"Unknown split {config.hf_split!r}; the folder has {', '.join(rows)}")
            return rows[config.hf_split]
        return rows

    def records(self) -> Iterator[Record]:
        """Yield the rows. Raises `DataError` for a bad row, `EnvironmentFault` if the connection is lost."""
        column, path = self.config.text_column, self.config.hf_path
        number = 0
        try:
            with one_line_a_wait(f"data.hf_path={path}"):
                for number, row in enumerate(self._rows, start=1):
                    text = find_text(row, column)
                    self.progress.bytes += 0 if isinstance(text, Problem) else _num_bytes(text)
                    yield from self._field(text, f"{path}, row {number}", row)
        except (ConnectionError, TimeoutError) as error:
            raise EnvironmentFault(f"{path}: connection lost after row {number} ({_first_line(error)})") from error
        except (OSError, EOFError, zlib.error, ValueError, self._datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{path}: cannot be read after row {number} ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ---------------------------------------------------------------------------------------------------- opening


def require_library(name: str, what: str) -> Any:
    """Import an optional library. Raises `EnvironmentFault` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EnvironmentFault(f"{what} needs the library {name}: pip install 'megatrain[data]' ({error})") from error


def open_source(config: DataConfig) -> Source:
    """Open the source that `data.kind` names and check its paths.

    Raises `ConfigError`, `DataError` or `EnvironmentFault`.
    """
    kinds: dict[str, Callable[[DataConfig], Source]] = {
        "python_stdlib": StdlibSource,
        "files": FilesSource,
        "huggingface": HuggingFaceSource,
    }
    return kinds[config.kind](config)

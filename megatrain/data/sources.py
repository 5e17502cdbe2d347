"""Sources of documents: the standard library, files, Hugging Face datasets. Yield raw records, clean nothing.

A source is opened, and its paths checked, before any expensive work. Documents come in the same order on every machine.
Nothing here keeps more than one document in memory.
"""

from __future__ import annotations

import glob
import gzip
import importlib
import itertools
import os
import platform
import sysconfig
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatrain.config import DataConfig
from megatrain.data.compressed import opened
from megatrain.data.normalise import Record
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
        if len(text) > self.config.max_document_bytes:
            self._too_long(where)
        else:
            yield Record(text, where)

    def _whole_file(self, path: Path) -> Iterator[Record]:
        limit = self.config.max_document_bytes
        with open(path, "rb") as file:
            data = file.read(limit + 1)
        self.progress.bytes += path.stat().st_size
        if len(data) > limit:
            self._too_long(str(path))
        else:
            yield Record(data, str(path))


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

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


class FilesSource(Source):
    """Files that `data.paths` matches, sorted by path.

    A document is a `.txt` or `.md` file, a line of `.jsonl` or a row of `.parquet`.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.files = _matches(config.paths)
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
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
            self.progress.bytes = before + path.stat().st_size

    def _read(self, path: Path) -> Iterator[Record]:
        if path.name.endswith((".txt", ".md")):
            return self._whole_file(path)
        if path.name.endswith(".parquet"):
            return self._parquet(path)
        return self._lines(path)

    def _lines(self, path: Path) -> Iterator[Record]:
        """Yield the lines of a `.jsonl`, compressed or not, with at most `data.max_document_bytes` in memory."""
        limit, before = self.config.max_document_bytes, self.progress.bytes
        with open(path, "rb", buffering=2**20) as raw, opened(path, raw) as file:
            try:
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
                    self.progress.bytes = before + raw.tell()
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise DataError(f"{path}: cut short or damaged ({error}); download or compress it again") from error

    def _parquet(self, path: Path) -> Iterator[Record]:
        pyarrow = require_library("pyarrow", ".parquet")
        import pyarrow.parquet as parquet

        column, before = self.config.text_column, self.progress.bytes
        try:
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                if column not in names:
                    raise DataError(f"{path}: no column {column!r} (it has {', '.join(names)}); set data.text_column")
                kind = file.schema_arrow.field(column).type
                if not any(
                    getattr(pyarrow.types, f"is_{t}")(kind)
                    for t in ("string", "large_string", "binary", "large_binary")
                ):
                    raise DataError(f"{path}: column {column!r} is {kind}, not text; set data.text_column")
                row, rows = 0, max(file.metadata.num_rows, 1)
                for batch in file.iter_batches(batch_size=64, columns=[column]):
                    for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        row += 1
                        yield from self._bounded(text or b"", f"{path}:{row}")
                    self.progress.bytes = before + path.stat().st_size * row // rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: cut short or damaged ({error}); download it again") from error


def _listing_hash(files: list[Path]) -> str:
    """Return the xxh3-128 of all names, sizes and modification times, which detects edits without reading the files."""
    digest = xxhash.xxh3_128()
    for path in files:
        entry = path.stat()
        digest.update(f"{path.name}\0{entry.st_size}\0{entry.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _matches(patterns: list[str]) -> list[Path]:
    """Return the files that the globs match. Raises `ConfigError` if a glob matches none or a suffix is unsupported."""
    if not patterns:
        raise ConfigError("data.paths: empty; give globs, for example 'data.paths=[corpus/**/*.jsonl]'")
    found: set[Path] = set()
    for pattern in patterns:
        matched = [
            Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(name)
        ]
        if not matched:
            raise ConfigError(f"data.paths: {pattern!r} matches no file (working folder {os.getcwd()})")
        found.update(matched)
    for path in sorted(found):
        if not path.name.endswith(SUFFIXES):
            raise ConfigError(f"data.paths: {path} has none of the suffixes {', '.join(SUFFIXES)}; narrow the glob")
    return sorted(found, key=lambda path: path.as_posix())


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
            self._rows = self._datasets.load_dataset(
                config.hf_path, config.hf_config, split=config.hf_split, streaming=True
            )
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{place}: {_first_line(error)}") from error
        except (ConnectionError, OSError) as error:
            raise EnvironmentFault(f"{place}: the hub could not be reached ({_first_line(error)})") from error
        columns = self._rows.column_names
        if columns is not None and config.text_column not in columns:
            raise ConfigError(f"data.text_column={config.text_column}: {config.hf_path} has {', '.join(columns)}")

    def records(self) -> Iterator[Record]:
        """Yield the rows. Raises `DataError` for a bad row, `EnvironmentFault` if the connection is lost."""
        column, path = self.config.text_column, self.config.hf_path
        number = 0
        try:
            for number, row in enumerate(self._rows, start=1):
                text = row.get(column)
                if not isinstance(text, str):
                    raise DataError(
                        f"{path}, row {number}: no text under {column!r} (it has {', '.join(row)}); "
                        "set data.text_column"
                    )
                self.progress.bytes += len(text)
                yield from self._bounded(text, f"{path}, row {number}")
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

"""Where documents come from: the standard library, files, Hugging Face datasets. Yields raw records, cleans nothing.

A source is opened (its places checked) before anything heavy happens, and read in an order that does not depend on the
machine. Nothing here holds more than one document in memory.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatrain.config import DataConfig
from megatrain.data.normalise import Record
from megatrain.errors import ConfigError, DataError


@dataclass
class Read:
    """How far reading got: bytes taken from the source so far (as stored), and documents refused as too long."""

    bytes: int = 0
    oversized: int = 0


class Source(ABC):
    """`identity` is what must be equal for a prepared dataset to be of the same source; `total_bytes` is what reading all
    of it will count in `progress.bytes` (None where unknown)."""

    identity: dict[str, Any]
    total_bytes: int | None

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.progress = Read()

    @abstractmethod
    def records(self) -> Iterator[Record]:
        """The documents, in a fixed order."""

    def _too_long(self, where: str) -> None:
        """Apply `data.oversized` to a document or line longer than `data.max_document_bytes`."""
        if self.config.oversized == "refuse":
            raise DataError(
                f"{where}: longer than data.max_document_bytes={self.config.max_document_bytes}; raise it, split the document, "
                "or set data.oversized=skip"
            )
        self.progress.oversized += 1

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

_TESTS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_NOT_EVERYWHERE = {"idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip", "venv"}


class StdlibSource(Source):
    """The `.py` files of the running Python's standard library; a file is a document.

    Left out, so that every machine with the same Python version has the same set: tests, installed packages, what
    distributions package apart, and files generated for one platform.
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
                if name not in _TESTS and not (top and (name in _NOT_EVERYWHERE or name.startswith("config-")))
            ]
            for name in names:
                path = Path(folder, name)
                generated = top and (name.startswith("_sysconfig") or name in ("sitecustomize.py", "usercustomize.py"))
                if name.endswith(".py") and not generated and path.is_file():
                    yield path

    def records(self) -> Iterator[Record]:
        for path in self.files:
            yield from self._whole_file(path)


def open_source(config: DataConfig) -> Source:
    """The source that `data.kind` names, its places checked. Raises `ConfigError` or `DataError`."""
    return StdlibSource(config)

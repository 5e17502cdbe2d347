"""The Python standard library as a corpus: real text that is on every machine."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatrain.config import DataConfig
from megatrain.data.corpus.record import Record
from megatrain.data.corpus.shard import Shard, group_files
from megatrain.data.corpus.source import Source
from megatrain.errors import DataError

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

    def shards(self) -> Iterator[Shard]:
        """Yield groups of files, sorted by path."""
        yield from group_files((path, path.stat().st_size) for path in self.files)

    def read(self, shard: Shard) -> Iterator[Record]:
        """Yield the files."""
        for path in map(Path, shard.paths):
            with open(path, "rb") as file:
                for record in self.whole_file(file, path):
                    yield record.within(str(path), 0, 1)
            self.progress.bytes += path.stat().st_size

"""The folder that a dataset is prepared in, and its rename to the dataset's name. Ignores the files' contents.

The staging folder is `.<name>.preparing` beside the target, locked while a process uses it. An interrupted preparation
leaves its folder `work` in it, from which the next one goes on; all else is made anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from megatrain.errors import ConfigError, cannot_write


class StagingFolder:
    """A locked folder for one preparation, empty but for `work`; `publish` renames it to the target, without `work`.

    Entering it raises `ConfigError` if another process is preparing this target, or its parent cannot be created.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f".{target.name}.preparing")
        self.work = self.folder / "work"
        self._replaced = target.with_name(f".{target.name}.replaced")
        self._lock = -1

    def __enter__(self) -> StagingFolder:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock_folder()
        except OSError as error:
            raise cannot_write(self.target.parent, error, "data.dir") from error
        if self._replaced.exists():  # an earlier process was killed in `publish`, after its first rename
            if self.target.exists():
                shutil.rmtree(self._replaced)
            else:
                os.rename(self._replaced, self.target)
        self._remove_all_but_work()
        self.work.mkdir(exist_ok=True)
        return self

    def _remove_all_but_work(self) -> None:
        for entry in self.folder.iterdir():
            if entry != self.work:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def has_work(self) -> bool:
        """Return whether there is something to go on from: a finished part of any stage."""
        return any(self.work.glob("*/*.json"))

    def _lock_folder(self) -> int:
        """Lock the folder itself and return its file descriptor; the lock ends with the process."""
        while True:
            self.folder.mkdir(exist_ok=True)
            lock = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                raise ConfigError(
                    f"data.name: another process is preparing {self.target}; wait for it, or choose another data.name"
                ) from None
            try:
                if os.path.samestat(os.fstat(lock), os.stat(self.folder)):
                    return lock
            except FileNotFoundError:
                pass
            os.close(lock)  # between opening and locking, another process renamed the folder to its dataset

    def publish(self) -> None:
        """Flush the folder to disk and rename it to the target, replacing an existing dataset."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            if self.work not in (path, *path.parents):
                _flush(path)
        shutil.rmtree(self.work)  # only now: flushing takes minutes, and an interrupted one goes on from there
        _flush(self.folder)
        if self.target.exists():
            os.rename(self.target, self._replaced)
        os.rename(self.folder, self.target)
        _flush(self.target.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self.folder.is_dir() and not self.has_work():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

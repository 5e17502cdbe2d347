"""The folder that a dataset is prepared in, and its rename to the dataset's name. Ignores the files' contents.

The staging folder is `.<name>.preparing` beside the target. One process at a time owns it (`resilience/owner.py`, which
works across the machines of a shared file system). An interrupted preparation leaves its folder `work` in it, from
which the next one goes on; all else is made anew. Tasks of a divided preparation write finished parts into `work`
without owning the folder: each part is renamed into place whole, and its content depends on its name alone.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from megatrain.errors import OwnedError, cannot_write
from megatrain.resilience.atomic_file import sync_path
from megatrain.resilience.owner import FOLDER, Ownership


class StagingFolder:
    """An owned folder for one preparation, empty but for `work`; `publish` renames its dataset to the target.

    Entering it raises `OwnedError` if another process is preparing this target, `ConfigError` if its parent cannot be
    created.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._root = target.with_name(f".{target.name}.preparing")
        self.folder = self._root / "dataset"
        self.work = work_folder(target)
        self._replaced = target.with_name(f".{target.name}.replaced")
        self._removed = target.with_name(f".{target.name}.removed")
        self._published = False
        self._beating = ExitStack()

    def __enter__(self) -> StagingFolder:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._root.mkdir(exist_ok=True)
            self._ownership = self._take()
            if self._replaced.exists():  # an earlier process was killed in `publish`, after its first rename
                if self.target.exists():
                    shutil.rmtree(self._replaced)
                else:
                    os.rename(self._replaced, self.target)
            shutil.rmtree(self._removed, ignore_errors=True)
            for entry in self._root.iterdir():
                if entry.name not in (self.work.name, FOLDER):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.folder.mkdir()
            self.work.mkdir(exist_ok=True)
        except OSError as error:
            raise cannot_write(self.target.parent, error, "data.dir") from error
        self._beating.enter_context(self._ownership.beating())
        return self

    def _take(self) -> Ownership:
        """Own the folder. It may be renamed by the process that published it, between being made and being owned."""
        while True:
            ownership = Ownership.take(self._root, name_key="data.name", dir_key="data.dir")
            try:
                ownership.check()
                return ownership
            except OwnedError:
                if self._root.exists():
                    raise

    def has_work(self) -> bool:
        """Return whether there is something to go on from: a finished part of any stage."""
        return any(self.work.glob("*/*.json"))

    def publish(self) -> None:
        """Flush the dataset to disk and rename it to the target, replacing an existing one.

        Raises `OwnedError` if another process has taken over the folder.
        """
        for path in sorted(self.folder.rglob("*"), reverse=True):
            sync_path(path)
        sync_path(self.folder)
        self._ownership.check()
        if self.target.exists():
            os.rename(self.target, self._replaced)
        os.rename(self.folder, self.target)
        self._published = True
        sync_path(self.target.parent)
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beating.close()
        if self._published or not self.has_work():
            self._remove()
        else:
            self._ownership.release()

    def _remove(self) -> None:
        """Rename the staging folder, then remove it: another process may begin a preparation of this name meanwhile."""
        shutil.rmtree(self._removed, ignore_errors=True)
        with suppress(OSError):
            os.rename(self._root, self._removed)
            shutil.rmtree(self._removed, ignore_errors=True)


def work_folder(target: Path) -> Path:
    """Return the folder with the finished parts of a preparation that is not complete yet."""
    return target.with_name(f".{target.name}.preparing") / "work"

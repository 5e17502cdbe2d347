"""Files that the parent process writes once and worker processes map into memory, so that all share one copy."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

from megatrain.resilience.atomic_file import sync_path


def shared_file(folder: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Return the file or folder `name` in `folder`, which `write` makes at the path it is given if there is none yet.

    It is complete and on disk once it has that name.
    """
    place = folder / name
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as made:
            new = Path(made) / name
            write(new)
            for path in [new, *new.rglob("*")] if new.is_dir() else [new]:
                sync_path(path)
            try:
                new.rename(place)
            except OSError:
                if not place.exists():  # another process may have been faster
                    raise
    return place


def own_folder() -> Path:
    """Return a folder of this process alone, removed at its end: for steps that were given none to share."""
    return Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="megatrain-")

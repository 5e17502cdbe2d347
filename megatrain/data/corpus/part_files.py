"""The files of a part while it is written: under names of this process alone, until all of them are whole.

Two processes may write the same part at once, as when Slurm starts a task again whose lost node still runs. Neither
touches what the other has finished, and both finish the same bytes.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatrain.data.indexed import hash_file

_WRITING = ".writing"


class PartFiles:
    """The files `<key>.<ending>` of a part in `folder`; they have these names once `finish` has been called."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._own = f".{socket.gethostname()}.{os.getpid()}{_WRITING}"
        self._files: dict[str, BinaryIO] = {}

    def __getitem__(self, ending: str) -> BinaryIO:
        """Return the open file of this ending, made when it is first asked for."""
        if ending not in self._files:
            path = self._folder / f"{self._key}.{ending}{self._own}"
            self._files[ending] = open(path, "wb")  # noqa: SIM115, closed by finish
        return self._files[ending]

    def finish(self) -> dict[str, str]:
        """Give the files their names and return the hash of each."""
        self.close()
        hashes = {}
        for ending, file in self._files.items():
            path = self._folder / f"{self._key}.{ending}"
            hashes[path.name] = hash_file(Path(file.name))
            os.replace(file.name, path)
        return hashes

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


@contextmanager
def closing_writers(coming: deque[Any]) -> Iterator[None]:
    """Close the writers of unfinished shards, the second of each entry, when an error ends a stage."""
    try:
        yield
    finally:
        for _, writer, *_ in coming:
            writer.close()


def remove_others(folder: Path, keys: set[str]) -> None:
    """Remove the parts of other keys, and what killed processes left half written."""
    for path in folder.iterdir():
        if path.name.partition(".")[0] not in keys or path.name.endswith(_WRITING):
            path.unlink(missing_ok=True)

"""Shards: the parts of a source that are read, cleaned and encoded as a whole, and redone alone if interrupted.

Where a corpus is cut depends on its files alone, never on the number of workers or tasks, so neither do the results.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatrain.errors import DataError

SHARD_BYTES = 64 * 2**20
"""Stored bytes of a shard, unless a single file that cannot be cut is larger."""


@dataclass(frozen=True)
class Shard:
    """Some files of a source, or a range of one file.

    `stamps` identify the contents without reading them: name, size and time of each file. `start` and `stop` are bytes
    of a file of lines, or row groups of a `.parquet`; a `stop` of None is the end. `num_bytes` is its size as stored.
    """

    paths: tuple[str, ...] = ()
    stamps: tuple[str, ...] = ()
    num_bytes: int = 0
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Share:
    """A task's share of the shards: every `tasks`-th one, from number `task` on. By default all of them."""

    task: int = 0
    tasks: int = 1

    def has(self, number: int) -> bool:
        """Return whether the shard of this number, in corpus order, is in the share."""
        return number % self.tasks == self.task

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole corpus."""
        return self.tasks == 1


ALL = Share()


def stamp(path: Path) -> str:
    """Return a file's name, size and modification time, by which an edit is noticed without reading it.

    Raises `DataError` if the file is gone.
    """
    entry = look(path)
    return f"{path.name}\0{entry.st_size}\0{entry.st_mtime_ns}"


def look(path: Path) -> os.stat_result:
    """Return the facts of a file that was found earlier. Raises `DataError` if it is gone."""
    try:
        return path.stat()
    except OSError as error:
        raise DataError(
            f"{path}: found when the files were listed, but now: {error.strerror}; prepare again"
        ) from error


def group_files(sized: Iterable[tuple[Path, int]]) -> Iterator[Shard]:
    """Yield shards of consecutive whole files, each of at least `SHARD_BYTES` but for the last."""
    paths: list[Path] = []
    size = 0
    for path, num_bytes in sized:
        paths.append(path)
        size += num_bytes
        if size >= SHARD_BYTES:
            yield _whole(paths, size)
            paths, size = [], 0
    if paths:
        yield _whole(paths, size)


def cut_file(path: Path, ends: Sequence[tuple[int, int]]) -> Iterator[Shard]:
    """Yield shards of one file: one up to each end, given as (place, bytes stored up to it), the last without end."""
    start = before = 0
    for number, (end, num_bytes) in enumerate(ends, start=1):
        stop = end if number < len(ends) else None
        yield Shard((str(path),), (stamp(path),), num_bytes - before, start, stop)
        start, before = end, num_bytes


def _whole(paths: list[Path], num_bytes: int) -> Shard:
    return Shard(tuple(map(str, paths)), tuple(map(stamp, paths)), num_bytes)

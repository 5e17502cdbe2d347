"""Lists in files, an entry a line, that cleaning steps read: of domains, words and the like."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

from megatrain.config.choices import special_file
from megatrain.data.corpus.compressed import ERRORS, opened, without_suffix
from megatrain.data.indexed import hash_file
from megatrain.errors import ConfigError, DataError


def digest_of(path: str) -> str:
    """Return the digest of a file, which is read again only if its size or time has changed.

    Raises `ConfigError` if it cannot be read.
    """
    place = Path(path).expanduser()
    if what := special_file(place):  # every worker reads it
        raise ConfigError(f"{path} is {what}, which can be read only once; write the list into a file and give that")
    try:
        entry = place.stat()
        return _digest(place, entry.st_size, entry.st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, time: int) -> str:
    return hash_file(path)


def read_list(path: str) -> Iterator[str]:
    """Yield the entries of a list in UTF-8, maybe compressed: its lines, or the elements of an array in a `.json`.

    Empty lines and those that begin with # are skipped. Raises `DataError` if the file is damaged, no such list, or
    has no entry.
    """
    place = Path(path).expanduser()
    is_empty = True
    try:
        with open(place, "rb") as raw, opened(place, raw) as file:
            if without_suffix(place.name).endswith(".json"):
                entries = json.loads(file.read())
                if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
                    raise DataError(f"{path}: not an array of texts; write an entry a line into a .txt")
                found: Iterator[str] = filter(None, map(str.strip, entries))
            else:
                lines = (line.decode("utf-8-sig").strip() for line in file)
                found = (line for line in lines if line and not line.startswith("#"))
            for entry in found:
                is_empty = False
                yield entry
    except (*ERRORS, OSError, ValueError) as error:
        raise DataError(f"{path}: not a list of words in UTF-8 ({error})") from error
    if is_empty:
        raise DataError(f"{path}: has no entry, so it would do nothing; write one a line, or leave the file out")

"""A table of the word n-grams of evaluation sets, in files that worker processes map: all share its pages.

It is built in bounded memory: texts in batches, their n-grams in runs by hash, which are sorted one after another. Its
folder has for each length of n-grams a file of sorted hashes and one of rows, and a file of the sets' texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatrain.data.corpus.evaluation_sets import EvaluationSet, read_texts
from megatrain.data.corpus.words import hash_ngrams, hash_words, split
from megatrain.errors import DataError

FORMAT = 1
"""Part of a table's name: raise it when the files change."""

_MIN_WORDS = 8  # fewer words are too common to tell anything
_ROW = np.dtype([("set", "<u4"), ("size", "<u4"), ("start", "<u8")])
"""Of an n-gram: its set, and where it is in the file of texts, in bytes."""
_HASHED = np.dtype([("hash", "<u8"), ("row", _ROW)])
_BATCH = 2**21  # characters of texts that are worked on at a time
_RUN_BITS = 6  # of the hash: 64 runs, each of which is sorted in memory


@dataclass(frozen=True)
class Hit:
    """A piece of a document (from `start` to `stop`, in characters) whose words are in a set, by the set's number."""

    set: int
    start: int
    stop: int


def write_table(sets: Sequence[EvaluationSet], size: int, folder: Path) -> None:
    """Write the table of n-grams of `size` words of sets into a new folder.

    A text of fewer words than an n-gram, but at least 8, is one n-gram of that length. Raises `DataError` for a set
    without any n-gram, or that cannot be read.
    """
    folder.mkdir()
    runs = folder / "runs"
    runs.mkdir()
    least = min(size, _MIN_WORDS)
    found: set[int] = set()
    lengths: set[int] = {size}
    with open(folder / "texts", "wb") as texts_file:
        for batch in _batches(sets):
            words = hash_words([text for _, text in batch])
            counts = np.diff(words.offsets)
            found.update(number for (number, _), count in zip(batch, counts.tolist(), strict=True) if count >= least)
            before = texts_file.tell()
            starts, stops = _byte_places(batch, words.starts, words.stops, words.offsets, before)
            texts_file.writelines(_bytes(text) for _, text in batch)
            of_set = np.array([number for number, _ in batch], np.uint32)
            for length in sorted({size, *(int(n) for n in counts if least <= n < size)}):
                lengths.add(length)
                hashes, offsets = hash_ngrams(words, length, short=False)
                of_text = np.repeat(np.arange(len(batch)), np.diff(offsets))
                # A shorter length is that of texts that are as long, and no longer.
                offered = np.flatnonzero(counts[of_text] == length if length < size else np.ones(len(hashes), bool))
                first = offered + (words.offsets[:-1] - offsets[:-1])[of_text[offered]]
                rows = np.zeros(len(offered), _HASHED)
                rows["hash"] = hashes[offered]
                rows["row"]["set"] = of_set[of_text[offered]]
                rows["row"]["start"] = starts[first]
                rows["row"]["size"] = stops[first + length - 1] - starts[first]
                _append(runs, length, rows)
    for number, one in enumerate(sets):
        if number not in found:
            raise DataError(f"{one.path}: no text of at least {least} words; is it the right file?")
    for length in lengths:
        _sort(runs, length, folder)
    runs.rmdir()
    (folder / "lengths.json").write_text(json.dumps(sorted(lengths)), encoding="utf-8")


class NgramTable:
    """A table that `write_table` wrote: what is equal in a document is found by hash, and checked on the text."""

    def __init__(self, folder: Path) -> None:
        self._texts = _mapped(folder / "texts", np.dtype(np.uint8))
        self._sizes = [
            (length, _mapped(folder / f"{length}.hashes", np.dtype("<u8")), _mapped(folder / f"{length}.rows", _ROW))
            for length in json.loads((folder / "lengths.json").read_text(encoding="utf-8"))
        ]

    def find(self, text: str) -> Iterator[Hit]:
        """Yield the n-grams of a document that are in a set, by their length and in the order of the text."""
        words = hash_words([text])
        for length, table, rows in self._sizes:
            hashes, _ = hash_ngrams(words, length, short=False)
            if not len(table) or not len(hashes):
                continue
            left = np.searchsorted(table, hashes)
            found = table[np.minimum(left, len(table) - 1)] == hashes
            for at in np.flatnonzero(found).tolist():
                start, stop = int(words.starts[at]), int(words.stops[at + length - 1])
                place = int(left[at])
                while place < len(table) and table[place] == hashes[at]:
                    row = rows[place]
                    if split(text[start:stop]) == split(self._text(int(row["start"]), int(row["size"]))):
                        yield Hit(int(row["set"]), start, stop)
                    place += 1

    def _text(self, start: int, size: int) -> str:
        return self._texts[start : start + size].tobytes().decode(errors="surrogatepass")


def _batches(sets: Sequence[EvaluationSet]) -> Iterator[list[tuple[int, str]]]:
    """Yield the texts of sets with the numbers of their sets, some `_BATCH` characters at a time."""
    batch: list[tuple[int, str]] = []
    characters = 0
    for number, one in enumerate(sets):
        for text in read_texts(one):
            batch.append((number, text))
            characters += len(text)
            if characters >= _BATCH:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _byte_places(
    batch: Iterable[tuple[int, str]], starts: np.ndarray, stops: np.ndarray, offsets: np.ndarray, before: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return where words begin and end in the file of texts, of which `before` bytes are written, from their places."""
    starts, stops = starts.astype(np.int64), stops.astype(np.int64)
    for (_, text), first, last in zip(batch, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if text.isascii():
            starts[first:last] += before
            stops[first:last] += before
            before += len(text)
        else:
            points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
            sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
            places = before + np.concatenate([[0], np.cumsum(sizes)])
            starts[first:last] = places[starts[first:last]]
            stops[first:last] = places[stops[first:last]]
            before = int(places[-1])
    return starts, stops


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _append(folder: Path, length: int, rows: np.ndarray) -> None:
    """Append rows to the runs of their length; a run has the hashes that begin with the same bits."""
    run = (rows["hash"] >> np.uint64(64 - _RUN_BITS)).astype(np.int64)
    order = np.argsort(run, kind="stable")
    ends = np.searchsorted(run[order], np.arange(2**_RUN_BITS + 1))
    for number in np.flatnonzero(np.diff(ends)).tolist():
        with open(folder / f"{length}.{number}", "ab") as file:
            file.write(rows[order[ends[number] : ends[number + 1]]].tobytes())


def _sort(runs: Path, length: int, folder: Path) -> None:
    """Write the sorted table of a length from its runs, and remove these. Of an n-gram a set has one row: the first."""
    with open(folder / f"{length}.hashes", "wb") as hashes_file, open(folder / f"{length}.rows", "wb") as rows_file:
        for number in range(2**_RUN_BITS):
            path = runs / f"{length}.{number}"
            if not path.exists():
                continue
            run = np.fromfile(path, _HASHED)
            order = np.lexsort((run["row"]["set"], run["hash"]))
            hashes, rows = run["hash"][order], run["row"][order]
            fresh = np.ones(len(hashes), bool)
            fresh[1:] = (hashes[1:] != hashes[:-1]) | (rows["set"][1:] != rows["set"][:-1])
            hashes_file.write(hashes[fresh].tobytes())
            rows_file.write(rows[fresh].tobytes())
            path.unlink()


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")

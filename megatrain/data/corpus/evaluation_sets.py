"""Evaluation sets: their texts, read from files, and a table of their word n-grams to look documents up in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.data.corpus.compressed import ERRORS, opened, without_suffix
from megatrain.data.corpus.word_lists import digest_of
from megatrain.data.corpus.words import hash_ngrams, hash_words, split
from megatrain.data.indexed import hash_file
from megatrain.errors import ConfigError, DataError

_LINES = (".jsonl", ".ndjson")
_MIN_WORDS = 8  # fewer words are too common to tell anything


@dataclass(frozen=True)
class EvaluationSet:
    """A file of evaluation texts: its name in reports, its path, the fields to read (none for all), its digest."""

    name: str
    path: str
    fields: tuple[str, ...] = ()
    digest: str = ""


def find_sets(entries: Sequence[Any]) -> tuple[EvaluationSet, ...]:
    """Return the sets that a list of paths, or of mappings with `path`, `name` and `fields`, describes.

    Raises ConfigError for an entry that is something else, a file that cannot be read, and two sets of one name.
    """
    sets = [_find(f"sets[{place}]", entry) for place, entry in enumerate(entries)]
    if not sets:
        raise ConfigError("sets: empty; list the files of the evaluation sets, such as [eval/questions.jsonl]")
    names = [one.name for one in sets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"sets: two are called {name}; name them apart: [{{path: ..., name: ...}}]")
    return tuple(sets)


def _find(place: str, entry: Any) -> EvaluationSet:
    given = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or not isinstance(given.get("path"), str) or set(given) - {"path", "name", "fields"}:
        raise ConfigError(f"{place}: {entry}: expected a path, or {{path: ..., name: ..., fields: [...]}}")
    path = Path(given["path"]).expanduser()
    fields = given.get("fields") or []
    if not isinstance(fields, list) or not all(isinstance(name, str) for name in fields):
        raise ConfigError(f"{place}.fields={fields}: expected a list of names such as [question,answer]")
    name = str(given.get("name") or without_suffix(path.name).partition(".")[0])
    try:
        digest = digest_of(str(path))
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}; give the file of a set") from error
    return EvaluationSet(name, str(path), tuple(fields), digest)


def read_texts(one: EvaluationSet) -> Iterator[str]:
    """Yield the texts of a set: each field of a `.jsonl` or `.json`, or the whole of another file.

    Raises `DataError` for a file that is damaged or has changed, or a record that lacks a field.
    """
    path = Path(one.path)
    if hash_file(path) != one.digest:
        raise DataError(f"{path}: the evaluation set has changed since the preparation began; start it again")
    try:
        with open(path, "rb") as raw, opened(path, raw) as file:
            text = file.read().decode("utf-8-sig")
    except (*ERRORS, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a set of evaluation texts in UTF-8 ({error})") from error
    name = without_suffix(path.name)
    if not name.endswith((*_LINES, ".json")):
        yield text
        return
    try:
        lines = enumerate(text.split("\n"), start=1) if name.endswith(_LINES) else []
        records = [(f"{path}:{number}", json.loads(line)) for number, line in lines if line.strip()]
        if name.endswith(".json"):
            whole = json.loads(text)
            records = [(str(path), record) for record in (whole if isinstance(whole, list) else [whole])]
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    for place, record in records:
        if not one.fields:
            yield from _strings(record)
        for field in one.fields:
            if not isinstance(record, dict) or field not in record:
                raise DataError(f"{place}: no field {field!r}; correct the set's fields")
            yield from _strings(record[field])


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


@dataclass(frozen=True)
class Hit:
    """A piece of a document (from `start` to `stop`, in characters) whose words are in a set, by the set's number."""

    set: int
    start: int
    stop: int


class NgramTable:
    """The n-grams of evaluation sets, sorted by hash: what is equal in a document is found, and checked on the text.

    A text of fewer words than an n-gram, but at least 8, is one n-gram of that length. `short` counts those of fewer.
    """

    def __init__(self, sets: Sequence[EvaluationSet], size: int) -> None:
        texts, owners = [], []
        for number, one in enumerate(sets):
            for text in read_texts(one):
                texts.append(text)
                owners.append(number)
        words = hash_words(texts)
        counts = np.diff(words.offsets)
        of_set = np.array(owners, np.int64)
        for number, one in enumerate(sets):
            if not (counts[of_set == number] >= min(size, _MIN_WORDS)).any():
                raise DataError(f"{one.path}: no text of at least {min(size, _MIN_WORDS)} words; is it the right file?")
        self._texts = texts
        self._sizes: list[tuple[int, np.ndarray, np.ndarray]] = []
        for length in sorted({size, *(int(n) for n in counts if min(size, _MIN_WORDS) <= n < size)}):
            hashes, offsets = hash_ngrams(words, length, short=False)
            if length < size:  # only texts that are that long and no longer
                offered = np.repeat(counts == length, np.diff(offsets))
            else:
                offered = np.ones(len(hashes), bool)
            of_text = np.repeat(np.arange(len(texts)), np.diff(offsets))
            first = np.arange(len(hashes)) - np.repeat(offsets[:-1] - words.offsets[:-1], np.diff(offsets))
            rows = np.zeros(int(offered.sum()), _ROW)
            rows["set"], rows["text"] = of_set[of_text[offered]], of_text[offered]
            rows["start"] = words.starts[first[offered]]
            rows["stop"] = words.stops[first[offered] + length - 1]
            # One row for an n-gram of a set: the first.
            order = np.lexsort((rows["set"], hashes[offered]))
            hashes, rows = hashes[offered][order], rows[order]
            fresh = np.ones(len(hashes), bool)
            fresh[1:] = (hashes[1:] != hashes[:-1]) | (rows["set"][1:] != rows["set"][:-1])
            self._sizes.append((length, hashes[fresh], rows[fresh]))

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
                    if split(text[start:stop]) == split(self._texts[row["text"]][row["start"] : row["stop"]]):
                        yield Hit(int(row["set"]), start, stop)
                    place += 1


_ROW = np.dtype([("set", "<u4"), ("text", "<u4"), ("start", "<u4"), ("stop", "<u4")])

"""Evaluation sets and their texts, read from files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatrain.data.corpus.compressed import ERRORS, opened, without_suffix
from megatrain.data.corpus.word_lists import digest_of
from megatrain.data.indexed import hash_file
from megatrain.errors import ConfigError, DataError

_LINES = (".jsonl", ".ndjson")


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
            raise ConfigError(f"sets: two have the name {name}; give each its own: [{{path: ..., name: ...}}]")
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

    A `.jsonl` is read line by line, other files as a whole. Raises `DataError` for a file that is damaged or has
    changed, or a record that lacks a field.
    """
    path = Path(one.path)
    if hash_file(path) != one.digest:
        raise DataError(f"{path}: the evaluation set has changed since the preparation began; start it again")
    name = without_suffix(path.name)
    try:
        with open(path, "rb") as raw, opened(path, raw) as file:
            if not name.endswith((*_LINES, ".json")):
                yield file.read().decode("utf-8-sig")
                return
            for place, record in _records(file, str(path), lines=name.endswith(_LINES)):
                yield from _texts(record, one.fields, place)
    except (*ERRORS, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a set of evaluation texts in UTF-8 ({error})") from error


def _records(file: BinaryIO, path: str, lines: bool) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file of JSON, and where each is."""
    try:
        if lines:
            for number, line in enumerate(file, start=1):
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield f"{path}:{number}", json.loads(text)
        else:
            whole = json.loads(file.read().decode("utf-8-sig"))
            yield from ((path, record) for record in (whole if isinstance(whole, list) else [whole]))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON ({error})") from error


def _texts(record: Any, fields: Sequence[str], place: str) -> Iterator[str]:
    if not fields:
        yield from _strings(record)
    for field in fields:
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

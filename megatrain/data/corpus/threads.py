"""Join comments that are records of their own, as in dumps of Reddit and message trees, into threads. Opens no files.

A comment has an id (`id`, `comment_id` or `message_id`) and a field `parent_id` or `parent`, null where it begins a
thread. A file in which no `parent` names a record has other records. Comments whose parent is not in the file are one
thread if they name the same post (`link_id`), or else the same parent. Threads are written as text by
`conversations.py`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatrain.data.corpus.conversations import IDS, PARENTS, Key, has_parent, key_of, keys, parents_of, reference
from megatrain.data.corpus.record import Record
from megatrain.data.corpus.source import num_bytes
from megatrain.errors import DataError

_THREADS = ("link_id", "message_tree_id")
_OVERHEAD = 1200  # bytes of memory for a record beside its text


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a comment belongs: its own key, its parent's possible keys, and its thread's key."""

    key: Key
    parents: tuple[Key, ...]
    thread: Key | None
    is_comment: bool
    is_sure: bool
    """Whether its fields are those of comments alone: many other records have a `parent`, such as a folder."""


def join_threads(records: Iterator[Record], name: str, limit: int) -> Iterator[Record]:
    """Yield each thread of a file's comments as one record, in the place of its first, and other records as they are.

    The whole file is held in memory. Raises `DataError` if that takes more than `limit` bytes, counting 1200 for each
    record beside its text.
    """
    held: list[Record] = []
    places: list[_Place | None] = []
    size = 0
    for record in records:
        size += num_bytes(record.payload) + _OVERHEAD
        if size > limit:
            raise DataError(
                f"{name}: data.join_comments=true holds a file's comments in memory, and these take more than "
                f"data.max_thread_bytes={limit}; raise it, or divide the file so that each thread is in one part"
            )
        held.append(record)
        places.append(_place(record))
    places = _without_others(places)
    roots = _roots(place for place in places if place)
    threads: dict[Key, list[int]] = {}
    for number, place in enumerate(places):
        if place:
            threads.setdefault(roots[place.key], []).append(number)
    for number, (record, place) in enumerate(zip(held, places, strict=True)):
        thread = threads[roots[place.key]] if place else [number]
        if len(thread) == 1 and not (place and place.is_comment):
            yield record
        elif number == thread[0]:
            yield _joined([held[at] for at in thread])


def _without_others(places: list[_Place | None]) -> list[_Place | None]:
    """Return the places, without those of records with a `parent` in a file where it never names a record."""
    known = {place.key for place in places if place}
    is_answered = any(parent in known for place in places if place for parent in place.parents)
    return [place if place and (is_answered or place.is_sure or not place.is_comment) else None for place in places]


def is_comment(record: Record) -> bool:
    """Return whether a record is a comment that answers something."""
    value = _object(record)
    return value is not None and reference(value, IDS) is not None and reference(value, PARENTS) is not None


def _joined(records: list[Record]) -> Record:
    """Return the comments of a thread as one record of JSON, which `conversations.py` writes as text."""
    parts = [
        one.payload if isinstance(one.payload, bytes) else one.payload.encode("utf-8", "replace") for one in records
    ]
    comments = b", ".join(part.strip().removeprefix(codecs.BOM_UTF8) for part in parts)
    return replace(records[0], payload=b'{"comments": [' + comments + b"]}")


def _roots(places: Iterable[_Place]) -> dict[Key, Key]:
    """Return what stands for the thread of each comment: the last that can be reached from answer to answered."""
    above: dict[Key, _Place] = {}
    for place in places:
        above.setdefault(place.key, place)
    roots: dict[Key, Key] = {}
    for start in above:
        path: dict[Key, None] = {}
        at: Key | None = start
        while at is not None and at not in roots and at not in path:
            path[at] = None
            at = _answered(above[at], above) if at in above else None
        if at is None:
            root = next(reversed(path))
        else:  # known already, or a circle of answers, which will be a bad record
            root = roots.get(at, at)
        roots.update(dict.fromkeys(path, root))
    return roots


def _answered(place: _Place, above: dict[Key, _Place]) -> Key | None:
    """Return the parent of a comment; if that is not in the file, what its thread has in common."""
    if found := next((parent for parent in place.parents if parent in above), None):
        return found
    common = place.thread or next(iter(place.parents), None)
    return None if common == place.key else common


def _object(record: Record) -> dict[str, Any] | None:
    """Return a record's JSON object, None if it is something else."""
    if record.problem or record.oversized or record.kind != "json":
        return None
    payload = record.payload
    text = payload.decode(errors="replace") if isinstance(payload, bytes) else payload
    try:
        value = json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _place(record: Record) -> _Place | None:
    """Return where a record belongs, None if it is no comment or post."""
    value = _object(record)
    own = key_of(value) if value else None
    if value is None or own is None:
        return None
    thread = reference(value, _THREADS)
    return _Place(
        key=own,
        parents=parents_of(value),
        thread=None if thread is None else keys(thread, ("t3",))[0],
        is_comment=has_parent(value) or thread is not None,
        is_sure="parent_id" in value or thread is not None,
    )

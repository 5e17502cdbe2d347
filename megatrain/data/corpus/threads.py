"""Join comments that are records of their own, as in dumps of Reddit and message trees, into threads. Opens no files.

A comment has an id (`id`, `comment_id` or `message_id`) and a field `parent_id` or `parent`, null where it begins a
thread. A file in which no `parent` names a record has other records. Comments whose parent is not in the file are one
thread if they name the same post (`link_id`), or else the same parent. Threads are written as text by
`conversations.py`. For `data=chat` the messages of a tree, as in OpenAssistant's dumps, become one conversation.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatrain.data.chat.errors import ConversationError
from megatrain.data.chat.tree import best_path
from megatrain.data.corpus.conversations import IDS, PARENTS, Key, has_parent, key_of, keys, parents_of, reference
from megatrain.data.corpus.record import Problem, Record
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
    held = list(_held(records, f"{name}: data.join_comments=true holds a file's comments", limit))
    places = _without_others([_place(record) for record in held])
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


def _held(records: Iterator[Record], who: str, limit: int) -> Iterator[Record]:
    """Yield records up to `limit` bytes of memory. Raises `DataError` beyond."""
    size = 0
    for record in records:
        size += num_bytes(record.payload) + _OVERHEAD
        if size > limit:
            raise DataError(
                f"{who} in memory, and these take more than data.max_thread_bytes={limit}; raise it, or divide the "
                "file so that each thread is in one part"
            )
        yield record


def is_message(record: Record) -> bool:
    """Return whether a record is a message of a tree, in the layout of OpenAssistant's dumps."""
    value = _object(record)
    return value is not None and {"message_id", "parent_id", "role", "text"} <= value.keys()


def join_messages(records: Iterator[Record], name: str, limit: int) -> Iterator[Record]:
    """Yield the best path of each tree of a file's messages as one record, in the place of its first message.

    A file whose first record is no message of a tree is left as it is. Otherwise all of it is held in memory: raises
    `DataError` if that takes more than `limit` bytes. Messages whose parent is missing, that answer one another in a
    circle or have an id again are bad records.
    """
    first = next(records, None)
    if first is None:
        return
    records = itertools.chain([first], records)
    if not is_message(first):
        yield from records
        return
    held = list(_held(records, f"{name}: data=chat holds a file's messages", limit))
    values = [_object(record) or {} if is_message(record) else None for record in held]
    places = [_place(record) if value else None for record, value in zip(held, values, strict=True)]
    above: dict[Key, _Place] = {}
    answers: dict[Key, list[dict[str, Any]]] = {}
    again = set()
    for number, (place, value) in enumerate(zip(places, values, strict=True)):
        if place and value:
            if place.key in above:
                again.add(number)
                continue
            above[place.key] = place
            if parent := reference(value, PARENTS):
                answers.setdefault(keys(parent, ("t1",))[0], []).append(value)
    roots = _roots([replace(place, thread=None) for place in above.values()])

    def replies(message: dict[str, Any]) -> list[dict[str, Any]]:
        own = key_of(message)
        return answers.get(own, []) if own else []

    for number, (record, place, value) in enumerate(zip(held, places, values, strict=True)):
        if not place or not value:
            yield record
        elif number in again:
            yield _bad(record, "duplicate_id", f"another message has the id {value['message_id']!r}")
        elif not place.parents:
            yield _path(record, value, replies)
        elif not any(parent in above for parent in place.parents):
            parent = value["parent_id"]
            yield _bad(record, "no_parent", f"its parent {parent!r} is no message of the file")
        elif roots[place.key] in above and above[roots[place.key]].parents:
            yield _bad(record, "circle", "the messages that it answers form a circle")


def _path(record: Record, root: dict[str, Any], replies: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> Record:
    """Return the best path from a root as a record of messages, with the other fields of the root."""
    try:
        path = best_path(root, replies)
    except ConversationError as error:
        return _bad(record, error.kind, error.message, error.remedy)
    others = {name: value for name, value in root.items() if name not in ("text", "role", "parent_id")}
    value = {"id": root["message_id"], **others, "messages": path}
    return replace(record, payload=json.dumps(value).encode())


def _bad(record: Record, kind: str, message: str, remedy: str = "mend it") -> Record:
    return replace(record, problem=Problem(kind, message, remedy))


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

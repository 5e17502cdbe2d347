"""Write conversations as plain text: lists of messages, and threads of comments with parent ids.

Messages become `User: ...`, `Assistant: ...`, with an empty line between them. Comments become `Ann: ...`, and
`Bob, to Ann: ...` where Bob answers Ann; each answer follows what it answers, in the order of the list.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from megatrain.data.corpus.record import Problem

FIELDS = ("messages", "conversations", "comments")
"""Fields that are taken for a conversation in a record without the field `data.text_column`."""

BEGINNINGS = ("title", "text", "body", "selftext")
"""Fields of a record with which a thread of comments begins."""

IDS = ("id", "comment_id", "message_id")
"""Fields that may hold a comment's id."""
PARENTS = ("parent_id", "parent")
"""Fields that may hold the id of what a comment answers."""

Key = tuple[str, str]
"""A comment or post: the prefix of its kind in dumps of Reddit (`t1` for comments, `t3` for posts) and its id.

One id may be that of a post and of a comment.
"""

_NAME_FIELDS = ("login", "username", "screen_name", "name", "display_name", "role")
"""Fields of an author that is an object, which may hold its name."""

_NAMES = {
    "human": "User",
    "prompter": "User",
    "gpt": "Assistant",
    "chatgpt": "Assistant",
    "bot": "Assistant",
    "model": "Assistant",
}
_DELETED = ("", "[deleted]", "[removed]")  # texts of comments that are left out, but not what answers them


def find_conversation(record: dict[str, Any], column: str) -> list[Any] | None:
    """Return the conversation under `column`, or where a record without that field usually has it; None for none.

    An empty list is a conversation without messages, unless another field has one with messages.
    """
    names = (column,) if column.partition(".")[0] in record else FIELDS
    lists = [value for name in names if isinstance(value := record.get(name), list)]
    found = [value for value in lists if any(isinstance(entry, dict) for entry in value)]
    return next(iter(found or [value for value in lists if not value]), None)


def render(conversation: list[Any], record: dict[str, Any]) -> str | Problem:
    """Return a conversation as text, or what is wrong with it.

    A list under `comments`, or one with ids of parents, is a thread, which begins with the record's title and text.
    """
    if (other := next((at for at, entry in enumerate(conversation, start=1) if not isinstance(entry, dict)), 0)) > 0:
        value = conversation[other - 1]
        return Problem("not_a_message", f"message {other} is {'null' if value is None else 'no object'}")
    if record.get("comments") is conversation or any(map(has_parent, conversation)):
        return _render_thread(conversation, record)
    parts = []
    for number, message in enumerate(conversation, start=1):
        role = _name(message, "role", "from", "author", "speaker", "name")
        text = _with_calls(_plain(_first(message, "content", "value", "text", "body")), message)
        if not role or text is None:
            has = ", ".join(map(repr, list(message)[:8]))
            expected = "role and content, or from and value, both text"
            return Problem("not_a_message", f"message {number} is not {expected} (it has {has})")
        if text.strip():
            parts.append(f"{_NAMES.get(role.lower(), role[:1].upper() + role[1:])}: {text.strip()}")
    return "\n\n".join(parts)


def _render_thread(comments: list[dict[str, Any]], record: dict[str, Any]) -> str | Problem:
    ids = {key_of(comment) for comment in comments} - {None}
    answers: dict[Key | None, list[dict[str, Any]]] = defaultdict(list)
    first: list[dict[str, Any]] = []
    for comment in comments:
        parent = next((key for key in parents_of(comment) if key in ids), None)
        (first if parent is None else answers[parent]).append(comment)
    parts = [text.strip() for name in BEGINNINGS if isinstance(text := record.get(name), str)]
    seen: set[Key | None] = {None}
    waiting: list[tuple[dict[str, Any], dict[str, Any] | None]] = [(comment, None) for comment in reversed(first)]
    written, last = 0, None
    while waiting:
        comment, answered = waiting.pop()
        written += 1
        text, author = _text_of_comment(comment), _author(comment)
        has = ", ".join(map(repr, list(comment)[:8]))
        which = "a comment" if (own_id := reference(comment, IDS)) is None else f"the comment {own_id!r}"
        if text is None:
            return Problem("not_a_message", f"{which} has no text under body, text or content (it has {has})")
        if author is None:
            return Problem("not_a_message", f"{which} has an author that is no name (it has {has})")
        if text not in _DELETED:
            # The roles of a conversation need no name of whom they answer, unless something stands between.
            is_plain = answered is None or (answered is last and "role" in comment)
            parts.append(f"{author}{'' if is_plain else f', to {_author(answered or {})}'}: {text}")
            last = comment
        if (own := key_of(comment)) not in seen:
            seen.add(own)
            waiting.extend((answer, comment) for answer in reversed(answers[own]))
    if written < len(comments):
        return Problem("not_a_message", f"{len(comments) - written} comments answer one another in a circle")
    return "\n\n".join(filter(None, parts))


def has_parent(entry: dict[str, Any]) -> bool:
    """Return whether an object has a field for the id of what it answers, even if that is null."""
    return any(name in entry and _may_be_id(entry[name]) for name in PARENTS)


def _may_be_id(value: Any) -> bool:
    return value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool))


def key_of(entry: dict[str, Any]) -> Key | None:
    """Return the key of a comment, or of a post, which has a title and no parent; None if it has no id."""
    own = reference(entry, IDS)
    kind = "t3" if "title" in entry and not has_parent(entry) else "t1"
    return None if own is None else keys(own, (kind,))[0]


def parents_of(entry: dict[str, Any]) -> tuple[Key, ...]:
    """Return the possible keys of what a comment answers; none if it begins a thread."""
    parent = reference(entry, PARENTS)
    return () if parent is None else keys(parent, ("t1", "t3"))


def keys(reference: str, kinds: tuple[str, ...]) -> tuple[Key, ...]:
    """Return what a reference may mean: what its prefix says, or else something of these kinds."""
    prefix, underscore, rest = reference.partition("_")
    return ((prefix, rest),) if underscore and prefix in ("t1", "t3") else tuple((kind, reference) for kind in kinds)


def reference(entry: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the id under the first of these fields that has one: text, or a number such as 0; None for none."""
    for name in names:
        value = entry.get(name)
        if isinstance(value, float) and value.is_integer():  # as a table has ids of which some are null
            value = int(value)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return str(value)
    return None


def _text_of_comment(comment: dict[str, Any]) -> str | None:
    """Return the text of a comment, or title and text of a post; None if there is none."""
    found, title = _first(comment, "body", "text", "content", "selftext"), comment.get("title")
    text = _with_calls(_plain(found), comment)
    if isinstance(title, str) and (text is not None or found is None):
        return "\n\n".join(part.strip() for part in (title, text) if part and part.strip() not in _DELETED)
    return None if text is None else text.strip()


def _author(comment: dict[str, Any]) -> str | None:
    """Return who wrote a comment, or its role; None if its author is something without a name."""
    names = ("author", "user", "name")
    value = next((comment[name] for name in names if comment.get(name) not in (None, "")), None)
    if value is not None:
        return str(value) if type(value) is int else _name(comment, *names)
    role = _name(comment, "role") or "Comment"
    return _NAMES.get(role.lower(), role[:1].upper() + role[1:])


def _name(entry: dict[str, Any], *names: str) -> str | None:
    """Return the name under the first of these fields that is not empty; None if that is something else."""
    value = next((entry[name] for name in names if entry.get(name) not in (None, "")), None)
    if isinstance(value, dict):
        value = _first(value, *_NAME_FIELDS)
    return (value.strip() or None) if isinstance(value, str) else None


def _first(entry: dict[str, Any], *names: str) -> Any:
    """Return the first field that there is and that is not null."""
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _plain(content: Any) -> str | None:
    """Return a message's text, which may come in parts; None if a part is something else, such as an image."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    found = [part.get("text") if isinstance(part, dict) else part for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    return "\n".join(texts) if len(texts) == len(parts) else None


def _with_calls(text: str | None, message: dict[str, Any]) -> str | None:
    """Append the calls of tools and functions to a message's text, each as its JSON."""
    calls: list[Any] = []
    for value in (message.get("tool_calls"), message.get("function_call")):
        calls += value if isinstance(value, list) else [value]
    written = [
        call if isinstance(call, str) else json.dumps(call, ensure_ascii=False)
        for call in calls
        if not _is_nothing(call)
    ]
    return "\n".join([*([text] if text else []), *written]) if written else text


def _is_nothing(value: Any) -> bool:
    """Return whether a value is null or empty, or an object of nulls, as tables have it for an object that is none."""
    if isinstance(value, dict):
        return all(map(_is_nothing, value.values()))
    return value is None or value in ("", [])

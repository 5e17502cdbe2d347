"""Write conversations as plain text: lists of messages, and threads of comments with parent ids.

Messages become `User: ...`, `Assistant: ...`, with an empty line between them. Comments become `Ann: ...`, and
`Bob, to Ann: ...` where Bob answers Ann; each answer follows what it answers, in the order of the list.
"""

from __future__ import annotations

import json
import re
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

_NAMES = {
    "human": "User",
    "prompter": "User",
    "gpt": "Assistant",
    "chatgpt": "Assistant",
    "bot": "Assistant",
    "model": "Assistant",
}
_DELETED = ("", "[deleted]", "[removed]")  # texts of comments that are left out, but not what answers them
_PREFIX = re.compile(r"t\d_")  # of the ids that parents are named by in dumps of Reddit


def find_conversation(record: dict[str, Any], column: str) -> list[Any] | None:
    """Return the conversation under `column`, or where a record without that field usually has it; None for none."""
    names = (column,) if column.partition(".")[0] in record else FIELDS
    for name in names:
        value = record.get(name)
        if isinstance(value, list) and value and any(isinstance(entry, dict) for entry in value):
            return value
    return None


def render(conversation: list[Any], record: dict[str, Any]) -> str | Problem:
    """Return a conversation as text, or what is wrong with it. A thread begins with the record's title and text."""
    if (other := next((at for at, entry in enumerate(conversation, start=1) if not isinstance(entry, dict)), 0)) > 0:
        value = conversation[other - 1]
        return Problem("not_a_message", f"message {other} is {'null' if value is None else 'no object'}")
    if any(name in entry for entry in conversation for name in PARENTS):
        return _render_thread(conversation, record)
    parts = []
    for number, message in enumerate(conversation, start=1):
        role = _first(message, "role", "from", "author", "speaker", "name")
        content = _first(message, "content", "value", "text", "body")
        text = _with_calls(_plain(content), message.get("tool_calls"))
        if not isinstance(role, str) or text is None:
            has = ", ".join(map(repr, list(message)[:8]))
            expected = "role and content, or from and value, both text"
            return Problem("not_a_message", f"message {number} is not {expected} (it has {has})")
        if text.strip():
            parts.append(f"{_NAMES.get(role.lower(), role[:1].upper() + role[1:])}: {text.strip()}")
    return "\n\n".join(parts)


def _render_thread(comments: list[dict[str, Any]], record: dict[str, Any]) -> str | Problem:
    ids = {_id(comment): comment for comment in reversed(comments)}
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    first: list[dict[str, Any]] = []
    for comment in comments:
        parent = _PREFIX.sub("", str(_first(comment, *PARENTS)))
        (answers[parent] if parent in ids else first).append(comment)
    parts = [text.strip() for name in BEGINNINGS if isinstance(text := record.get(name), str)]
    seen: set[str] = set()
    waiting: list[tuple[dict[str, Any], dict[str, Any] | None]] = [(comment, None) for comment in reversed(first)]
    written, last = 0, None
    while waiting:
        comment, answered = waiting.pop()
        written += 1
        text = _text_of_comment(comment)
        if text is None:
            has = ", ".join(map(repr, list(comment)[:8]))
            return Problem("not_a_message", f"a comment has no text under body, text or content (it has {has})")
        if text not in _DELETED:
            # The roles of a conversation need no name of whom they answer, unless something stands between.
            is_plain = answered is None or (answered is last and "role" in comment)
            parts.append(f"{_author(comment)}{'' if is_plain else f', to {_author(answered)}'}: {text}")
            last = comment
        if (own := _id(comment)) not in seen:
            seen.add(own)
            waiting.extend((answer, comment) for answer in reversed(answers[own]))
    if written < len(comments):
        return Problem("not_a_message", f"{len(comments) - written} comments answer one another in a circle")
    return "\n\n".join(filter(None, parts))


def _text_of_comment(comment: dict[str, Any]) -> str | None:
    """Return the text of a comment, or title and text of a post; None if there is none."""
    text, title = _first(comment, "body", "text", "content", "selftext"), comment.get("title")
    if isinstance(title, str) and (text is None or isinstance(text, str)):
        return "\n\n".join(part.strip() for part in (title, text) if part and part.strip() not in _DELETED)
    return text.strip() if isinstance(text, str) else None


def _author(comment: dict[str, Any] | None) -> str:
    assert comment is not None
    if (name := _first(comment, "author", "user", "name")) is not None:
        return str(name)
    role = str(comment.get("role") or "Comment")
    return _NAMES.get(role.lower(), role[:1].upper() + role[1:])


def _id(comment: dict[str, Any]) -> str:
    own = _first(comment, *IDS)
    return _PREFIX.sub("", str(id(comment) if own is None else own))


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


def _with_calls(text: str | None, calls: Any) -> str | None:
    """Append the calls of tools to a message's text, each as its JSON."""
    if not isinstance(calls, list) or not calls:
        return text
    return "\n".join([*([text] if text else []), *(json.dumps(call, ensure_ascii=False) for call in calls)])

"""Read a conversation out of a record: messages, instruction triples, a prompt and its completion, or a tree.

All forms become a list of messages, each with a `role` and a `content`. `to_text` writes that as one line of JSON,
which is the text of such a document until it is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from megatrain.data.chat.errors import ConversationError
from megatrain.data.chat.tree import best_path

ROLES = ("system", "user", "assistant")
Message = dict[str, str]

_SAME_ROLE = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_LISTS = ("messages", "conversations", "conversation")
NOT_READ = ("history", "tools", "functions", "images")
"""Fields of a record that belong to its conversation, but have no place among its messages."""
_FORMS = (
    "messages (a list of objects with role and content), conversations (with from and value), instruction with input "
    "and output, or prompt with completion"
)


def read_conversation(record: dict[str, Any], normalise: Callable[[str], str] = str) -> list[Message]:
    """Return the messages of a record, each normalised.

    At most one system message comes first; then users and assistants take turns, a user first; an assistant ends it.
    Raises `ConversationError` otherwise.
    """
    if lost := [name for name in NOT_READ if record.get(name)]:
        raise ConversationError(
            "unknown_key",
            f"it has {', '.join(map(repr, lost))}, which would be lost",
            "leave it out, or write what it says as messages",
        )
    if record.get("chosen") is not None and record.get("rejected") is not None:
        raise ConversationError(
            "no_conversation", "it is a preference pair", "prepare it with data=pairs (for method=dpo or reward)"
        )
    found = [*system_of(record.get("system")), *_messages(record)]
    messages = [{**message, "content": normalise(message["content"])} for message in found]
    check_turns(messages, last="assistant")
    return messages


def to_text(messages: list[Message]) -> str:
    """Return messages as one line of JSON."""
    return json.dumps(messages, ensure_ascii=False)


def from_text(text: str) -> list[Message] | dict[str, Any]:
    """Return the messages that `to_text` wrote, or what `read_prompt` did."""
    messages: list[Message] | dict[str, Any] = json.loads(text)
    return messages


def system_of(given: Any) -> list[Message]:
    """Return the system message that a record has in a field of its own, if any."""
    if not given:
        return []
    if not isinstance(given, str):
        raise ConversationError("bad_message", "its system message is no text")
    return [{"role": "system", "content": given}]


def _messages(record: dict[str, Any]) -> list[Message]:
    """Return the messages of the first form that a record has, with roles by their usual names."""
    for name in _LISTS:
        if record.get(name) is not None:
            return messages_of(name, record[name])
    if record.get("instruction") is not None:
        instruction, given = record["instruction"], record.get("input") or ""
        if isinstance(instruction, str) and isinstance(given, str):
            question = "\n\n".join(filter(None, (instruction, given)))
            return _pair("instruction", question, "output", record.get("output"))
        name, value = ("input", given) if isinstance(instruction, str) else ("instruction", instruction)
        return _pair(name, value, "output", record.get("output"))
    if record.get("prompt") is not None:
        prompt, completion = record["prompt"], record.get("completion", record.get("response"))
        if isinstance(prompt, dict) and completion is None:
            return messages_of("prompt", best_path(prompt, lambda message: message.get("replies")))
        if isinstance(prompt, list) and isinstance(completion, list):
            return messages_of("prompt and completion", [*prompt, *completion])
        return _pair("prompt", prompt, "completion", completion)
    has = ", ".join(map(repr, list(record)[:8])) or "no fields"
    raise ConversationError("no_conversation", f"no conversation (it has {has})", f"give {_FORMS}")


def _pair(asked: str, question: Any, name: str, answer: Any) -> list[Message]:
    for what, value in ((asked, question), (name, answer)):
        if not isinstance(value, str):
            kind = "null or missing" if value is None else f"no text ({json.dumps(value)[:40]})"
            raise ConversationError("no_conversation", f"{what} is {kind}", f"give {_FORMS}")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def messages_of(name: str, value: Any) -> list[Message]:
    """Return the messages of a list under the field `name`. Raises `ConversationError` if it is none."""
    if not isinstance(value, list) or not value:
        raise ConversationError(
            "no_conversation", f"{name} is {'empty' if value == [] else 'no list'}", f"give {_FORMS}"
        )
    messages = []
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict):
            raise ConversationError("bad_message", f"message {number} is {'null' if entry is None else 'no object'}")
        pair = next((pair for pair in (("role", "content"), ("from", "value")) if pair[0] in entry), None)
        if pair is None:
            has = ", ".join(map(repr, list(entry)[:8])) or "no fields"
            raise ConversationError("bad_message", f"message {number} has no role (it has {has})", f"give {_FORMS}")
        if unknown := [key for key in entry if key not in pair and entry[key] not in (None, [], {}, "")]:
            raise ConversationError(
                "unknown_key",
                f"message {number} has {', '.join(map(repr, unknown[:4]))} beside {pair[0]} and {pair[1]}",
                "leave it out: it has no effect",
            )
        role, content = entry[pair[0]], entry.get(pair[1])
        if not isinstance(role, str) or not isinstance(content, str):
            what = pair[0] if not isinstance(role, str) else pair[1]
            raise ConversationError("bad_message", f"message {number}: its {what} is no text")
        messages.append({"role": _SAME_ROLE.get(role.lower(), role.lower()), "content": content})
    return messages


def check_turns(messages: list[Message], last: str) -> None:
    """Check that roles are in order, that each message says something, and that the `last` one is that role's."""
    expected = "user"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in ROLES:
            raise ConversationError("bad_role", f"message {number} has the role {role!r}", f"use {', '.join(ROLES)}")
        if not message["content"].strip():
            raise ConversationError("empty_message", f"message {number} ({role}) is empty")
        if role == "system" and number == 1:
            continue
        if role != expected:
            raise ConversationError(
                "role_order",
                f"message {number} is the {role}'s, where the {expected}'s turn is",
                "let user and assistant take turns, after at most one system message",
            )
        expected = "assistant" if role == "user" else "user"
    if messages[-1]["role"] != last:
        what = "the assistant's reply" if last == "assistant" else "the user's message"
        raise ConversationError(
            "no_reply" if last == "assistant" else "no_prompt", f"it does not end with {what}", "end it with one"
        )

"""Read a preference pair out of a record: a prompt with a chosen and a rejected reply. Opens no files.

All forms become two conversations that begin alike and end with different replies. `pair_to_text` writes them as one
line of JSON, which is the text of such a document until it is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatrain.data.chat.conversation import (
    NOT_READ,
    Message,
    check_turns,
    messages_of,
    system_of,
)
from megatrain.data.chat.errors import ConversationError

SIDES = ("chosen", "rejected")
_PROMPTS = ("messages", "conversations", "conversation")
_NOT_READ = (*NOT_READ, "margin", "images", "chat_template_kwargs")
_FORMS = (
    "give prompt, chosen and rejected (text, or lists of messages), or chosen and rejected as two whole conversations "
    "that begin alike"
)


@dataclass(frozen=True)
class Pair:
    """Two conversations whose first `num_prompt` messages are equal; what follows is the chosen or rejected reply."""

    chosen: list[Message]
    rejected: list[Message]
    num_prompt: int

    @property
    def prompt(self) -> list[Message]:
        """The messages that both have."""
        return self.chosen[: self.num_prompt]

    @property
    def num_given(self) -> int:
        """The number of the assistant's messages in the prompt, which do not count in the loss."""
        return sum(message["role"] == "assistant" for message in self.prompt)


def read_pair(record: dict[str, Any], normalise: Callable[[str], str] = str) -> Pair:
    """Return the pair of a record, its messages normalised. Raises `ConversationError` if it is no such pair."""
    if lost := [name for name in _NOT_READ if record.get(name)]:
        raise ConversationError(
            "unknown_key", f"it has {', '.join(map(repr, lost))}, which would have no effect", "leave it out"
        )
    if missing := [side for side in SIDES if record.get(side) is None]:
        has = ", ".join(map(repr, list(record)[:8])) or "no fields"
        raise ConversationError("no_pair", f"{' and '.join(missing)} is null or missing (it has {has})", _FORMS)
    prompt = [*system_of(record.get("system")), *_prompt(record)]
    sides = [_clean([*prompt, *_reply(side, record[side])], normalise) for side in SIDES]
    for side, messages in zip(SIDES, sides, strict=True):
        _check(side, messages)
    chosen, rejected = sides
    if chosen == rejected:
        raise ConversationError(
            "equal_pair", "chosen and rejected are equal, so neither is better", "leave the record out"
        )
    common = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if common is None or chosen[common]["role"] != "assistant":
        raise ConversationError(
            "different_prompts",
            "chosen and rejected differ before the last reply, or one goes on after the other's end",
            "let both answer the same prompt",
        )
    return Pair(chosen, rejected, common)


def _prompt(record: dict[str, Any]) -> list[Message]:
    """Return the messages of a prompt that has a field of its own; none if both sides are whole conversations."""
    if record.get("prompt") is not None:
        return _side("prompt", record["prompt"], "user")
    if record.get("instruction") is not None:
        parts = [record["instruction"], record.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise ConversationError("no_pair", "instruction or input is no text", _FORMS)
        return [{"role": "user", "content": "\n\n".join(filter(None, parts))}]
    name = next((name for name in _PROMPTS if record.get(name) is not None), None)
    if name is not None:
        return messages_of(name, record[name])
    if isinstance(record["chosen"], str) or isinstance(record["rejected"], str):
        raise ConversationError("no_pair", "chosen and rejected are text without a prompt", _FORMS)
    return []


def _reply(name: str, value: Any) -> list[Message]:
    return _side(name, [value] if isinstance(value, dict) else value, "assistant")


def _side(name: str, value: Any, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of(name, value)


def _clean(messages: list[Message], normalise: Callable[[str], str]) -> list[Message]:
    return [{**message, "content": normalise(message["content"])} for message in messages]


def _check(side: str, messages: list[Message]) -> None:
    try:
        check_turns(messages, last="assistant")
    except ConversationError as error:
        raise ConversationError(error.kind, f"{side}: {error.message}", error.remedy) from error


def pair_to_text(pair: Pair) -> str:
    """Return a pair as one line of JSON."""
    sides = {"chosen": pair.chosen[pair.num_prompt :], "rejected": pair.rejected[pair.num_prompt :]}
    return json.dumps({"prompt": pair.prompt, **sides}, ensure_ascii=False)


def pair_from_text(text: str) -> Pair:
    """Return the pair that `pair_to_text` wrote."""
    found = json.loads(text)
    prompt: list[Message] = found["prompt"]
    return Pair([*prompt, *found["chosen"]], [*prompt, *found["rejected"]], len(prompt))

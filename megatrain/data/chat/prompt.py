"""Prompts whose replies a program can judge: a question, and the fields of its record that rewards get.

A prompt's document in a dataset is what its template makes of the question, up to where the reply begins, and then the
record itself: the bytes of its JSON, each as an id. Only the ids of the question count as labels, which tells the two
apart; so the record goes through preparation, its checksums and the dataset's fingerprint like any text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatrain.data.chat.conversation import check_turns, messages_of
from megatrain.data.chat.errors import ConversationError
from megatrain.data.chat.template import ChatTemplate

_FORMS = "prompt (text, or a list of messages), messages, or instruction with input"
_TAKEN = ("prompts", "completions", "stopped")
"""Names that rewards get anyway, so no field may have them."""


@dataclass(frozen=True)
class Prompt:
    """A question's ids, `prompt` as the record has it (text or messages), and the record's other fields."""

    ids: list[int]
    prompt: Any
    fields: dict[str, Any]


def read_prompt(record: dict[str, Any], normalise: Callable[[str], str] = str) -> dict[str, Any]:
    """Return a record's question as `messages`, and all that rewards get of it as `record`, for `encode_prompt`.

    The question is a `prompt` (text, or messages of which the last is the user's), `messages`, or an `instruction` with
    its `input`. All other fields are the rewards'. Raises `ConversationError` if there is none.
    """
    rest = dict(record)
    if rest.get("instruction") is not None:
        instruction, given = rest.pop("instruction"), rest.pop("input", None) or ""
        if not isinstance(instruction, str) or not isinstance(given, str):
            raise ConversationError("no_prompt", "its instruction or its input is no text", f"give {_FORMS}")
        asked: Any = "\n\n".join(filter(None, (instruction, given)))
    else:
        name = next((name for name in ("prompt", "messages") if rest.get(name) is not None), None)
        if name is None:
            has = ", ".join(map(repr, list(record)[:8])) or "no fields"
            raise ConversationError("no_prompt", f"no prompt (it has {has})", f"give {_FORMS}")
        asked = rest.pop(name)
    if taken := [name for name in _TAKEN if name in rest]:
        raise ConversationError("taken_name", f"it has {taken[0]!r}, which rewards get of every reply", "rename it")
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else messages_of("prompt", asked)
    messages = [{**message, "content": normalise(message["content"])} for message in messages]
    check_turns(messages, last="user")
    return {"messages": messages, "record": {"prompt": asked, "fields": rest}}


def encode_prompt(chat: ChatTemplate, content: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a prompt's document, and of each whether it is the question's."""
    question = chat.encode(content["messages"], asks=True).ids
    record = list(json.dumps(content["record"]).encode("ascii"))
    return np.array([*question, *record]), np.array([1] * len(question) + [0] * len(record), np.uint8)


def decode_prompt(ids: np.ndarray, counts: np.ndarray) -> Prompt:
    """Return the prompt whose document this is."""
    length = int(counts.sum())
    record = json.loads(bytes(ids[length:].astype(np.uint8)))
    return Prompt(ids[:length].tolist(), record["prompt"], record["fields"])

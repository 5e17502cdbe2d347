"""The best path through a tree of messages in OpenAssistant's layout: each has `text`, `role`, maybe `rank`, `deleted`.

One path per tree, so that no message counts in the loss twice and no tree is both trained on and held out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatrain.data.chat.errors import ConversationError


def best_path(root: Any, replies: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Return the messages, with `role` and `content`, from the root on to the best reply each time, up to an answer.

    The best has the lowest `rank`; among equals and those without, the first. Deleted replies are passed over with what
    answers them; users' messages that nobody answered are cut off. Raises `ConversationError` for a deleted root,
    and for a message or a rank that is none.
    """
    _check(root)
    if root.get("deleted"):
        raise ConversationError("deleted", "its first message is deleted", "leave the tree out")
    path = [root]
    while answers := replies(path[-1]) or []:
        if not isinstance(answers, list):
            raise ConversationError("bad_message", "replies is no list")
        for answer in answers:
            _check(answer)
        left = [answer for answer in answers if not answer.get("deleted")]
        if not left:
            break
        path.append(min(left, key=_rank))
    while len(path) > 1 and path[-1].get("role") in ("prompter", "user"):
        path.pop()
    return [{"role": message.get("role"), "content": message.get("text")} for message in path]


def _check(message: Any) -> None:
    """Check that a message of a tree is an object with a rank or none."""
    if not isinstance(message, dict):
        raise ConversationError("bad_message", "a message of the tree is no object")
    rank = message.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, (int, float))):
        raise ConversationError("bad_message", f"a message has the rank {rank!r}", "give a number, or null")


def _rank(message: dict[str, Any]) -> float:
    rank = message.get("rank")
    return float("inf") if rank is None else rank

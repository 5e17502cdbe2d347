"""Rewards that come with megatrain. A user's own reward is a function of the same form.

A reward function takes lists, one element a reply, by name: `prompts` and `completions` (texts), `stopped` (whether the
reply ended by itself), and any field of the prompts' records. It returns one number a reply. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Reward = Callable[..., Sequence[float]]


def exact_match(completions: list[str], stopped: list[bool], answer: list[object]) -> list[float]:
    """Return 1 for a reply that ended by itself and is the record's `answer`, apart from whitespace around it."""
    return [
        float(ended and text.strip() == _text(right))
        for text, ended, right in zip(completions, stopped, answer, strict=True)
    ]


def contains(completions: list[str], answer: list[object]) -> list[float]:
    """Return 1 for a reply that has the record's `answer` in it, not as a part of a longer word or number."""
    return [
        float(re.search(rf"(?<!\w){re.escape(_text(right))}(?!\w)", text) is not None)
        for text, right in zip(completions, answer, strict=True)
    ]


def matches(completions: list[str], stopped: list[bool], pattern: list[str]) -> list[float]:
    """Return 1 for a reply that ended by itself and that the record's regular expression `pattern` matches as a whole.

    A pattern that begins with `(?s)` lets a dot match line feeds too.
    """
    return [
        float(ended and re.fullmatch(wanted, text.strip()) is not None)
        for text, ended, wanted in zip(completions, stopped, pattern, strict=True)
    ]


def ends_by_itself(stopped: list[bool]) -> list[float]:
    """Return 1 for a reply that ended by itself, within the largest number of tokens."""
    return [float(ended) for ended in stopped]


def _text(answer: object) -> str:
    return str(answer).strip()


EMBEDDED: dict[str, Reward] = {
    "exact_match": exact_match,
    "contains": contains,
    "matches": matches,
    "ends_by_itself": ends_by_itself,
}
"""The embedded rewards by the names that `method.rewards` takes."""

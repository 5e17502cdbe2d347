"""Rewards that come with megatrain. A user's own reward is a function of the same form.

A reward function takes lists, one element a reply, by name: `prompts` and `completions` (texts), `stopped` (whether the
reply ended by itself), and any field of the prompts' records. It returns one number a reply. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_FIRST_WITHOUT_GAPS = "\u2e80"
"""Where Unicode's radicals and ideographs of East Asia begin."""

Reward = Callable[..., Sequence[float]]


def exact_match(completions: list[str], stopped: list[bool], answer: list[object]) -> list[float]:
    """Return 1 for a reply that ended by itself and is the record's `answer`, apart from whitespace around it."""
    return [
        float(ended and text.strip() == _text(right))
        for text, ended, right in zip(completions, stopped, answer, strict=True)
    ]


def contains(completions: list[str], answer: list[object]) -> list[float]:
    """Return 1 for a reply that has the record's `answer` in it, not as a part of a longer word or number."""
    return [float(_holds(text, _text(right))) for text, right in zip(completions, answer, strict=True)]


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


def _holds(text: str, answer: str) -> bool:
    """Return whether an answer is in a text, and neither end of it within a word or a number."""
    at = text.find(answer)
    while at >= 0:
        stop = at + len(answer)
        if not answer or not (_goes_on(text[:at][-1:], answer[0]) or _goes_on(answer[-1], text[stop : stop + 1])):
            return True
        at = text.find(answer, at + 1)
    return False


def _goes_on(left: str, right: str) -> bool:
    """Return whether two neighbours belong to one number or word. Chinese and Japanese have no gaps between words."""
    if left.isdigit() and right.isdigit():
        return True
    return all(one.isalpha() and one < _FIRST_WITHOUT_GAPS for one in (left, right))


def _text(answer: object) -> str:
    return str(answer).strip()


EMBEDDED: dict[str, Reward] = {
    "exact_match": exact_match,
    "contains": contains,
    "matches": matches,
    "ends_by_itself": ends_by_itself,
}
"""The embedded rewards by the names that `method.rewards` takes."""

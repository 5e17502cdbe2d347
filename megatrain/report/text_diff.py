"""What a cleaning step changed in a text, as pieces to draw: kept, removed, added and skipped over."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from itertools import groupby

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|\n|[^\S\n]+|.", re.DOTALL)
"""What is compared: words, single Chinese or Japanese characters, white space and signs."""
_CONTEXT = 120
"""Characters shown before and after a change; what lies further away is skipped over."""


def diff(before: str, after: str, are_cut: bool) -> list[list[str]]:
    """Return `[kind, text]` pieces in reading order; kinds: `=` kept, `-` removed, `+` added, `~` kept and not shown.

    `are_cut` says that the texts are only the beginnings of longer ones. Then a difference at the very end is none: the
    shorter text goes on there.
    """
    old, new = _WORD.findall(before), _WORD.findall(after)
    pieces: list[tuple[str, str]] = []
    for kind, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(("=", "".join(old[a:b])))
            continue
        pieces += [("-", "".join(old[a:b]))] * (b > a) + [("+", "".join(new[c:d]))] * (d > c)
    while are_cut and pieces and pieces[-1][0] != "=":
        pieces.pop()
    joined = [(kind, "".join(text for _, text in run)) for kind, run in groupby(pieces, key=lambda piece: piece[0])]
    return [piece for at, (kind, text) in enumerate(joined) for piece in _shorten(kind, text, at, len(joined))]


def _shorten(kind: str, text: str, at: int, count: int) -> list[list[str]]:
    """Return a piece, or of a long kept one only what is near a change."""
    head, tail = _CONTEXT * (at > 0), _CONTEXT * (at < count - 1)
    if kind != "=" or len(text) <= head + tail + _CONTEXT or count == 1:
        return [[kind, text]]
    shown = [["=", text[:head]]] * (head > 0)
    hidden = len(text) - head - tail
    return [*shown, ["~", f"{hidden:,} characters"], *([["=", text[-tail:]]] * (tail > 0))]

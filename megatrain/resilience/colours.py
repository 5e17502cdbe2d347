"""Colours of the lines on a terminal: what failed, what to look at, what may be passed over. Imports no torch.

Only the terminal's writer uses this (`terminal.py`), so no log, file or pipe ever gets a colour.
"""

from __future__ import annotations

import os
import re

RED, GREEN, YELLOW, CYAN, DIM, PLAIN = (f"\x1b[{code}m".encode() for code in (31, 32, 33, 36, 2, 0))

PLAIN_TERMINALS = ("dumb", "unknown")
"""Values of TERM without escape sequences."""

_COLOURS = [
    (re.compile(rb"^(?:megatrain: )?(error:)"), RED),
    (re.compile(rb"^(?:megatrain: )?(warning:)"), YELLOW),
    (re.compile(rb"^(note: .*)"), DIM),
    (re.compile(rb"^(step +\d+: held-out .*)"), CYAN),
    (re.compile(rb"^(saved .*|run done.*)"), GREEN),
]


def are_wanted() -> bool:
    """Return whether the environment allows colours: NO_COLOR is not set (https://no-color.org), TERM has them."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in PLAIN_TERMINALS


def paint(data: bytes) -> bytes:
    """Return whole lines of standard error with their colours; a part of a line stays as it is."""
    return b"".join(_line(line) if line.endswith(b"\n") else line for line in data.splitlines(keepends=True))


def _line(line: bytes) -> bytes:
    for pattern, colour in _COLOURS:
        if found := pattern.match(line):
            start, end = found.span(1)
            return line[:start] + colour + line[start:end] + PLAIN + line[end:]
    return line

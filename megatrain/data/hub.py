"""Waiting for the Hugging Face hub: one line for a series of retries, instead of the libraries' own messages."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_FAILED = re.compile(r"(?P<why>.*) thrown while requesting ", re.DOTALL)
_AGAIN = re.compile(r"(?:Retrying in|Waiting) (?P<wait>[\d.]+) ?s.*?(?P<number>\d+)/(?P<most>\d+)\]", re.DOTALL)
_LONGEST_WAIT_S = 8.0
"""Longest pause of huggingface_hub, which doubles its pauses."""


@contextmanager
def one_line_a_wait(what: str) -> Iterator[None]:
    """Within the context, print one line when huggingface_hub or datasets starts to repeat a failed request.

    It names `what` is asked for, why the request failed, and how often and how long it will be repeated. The libraries'
    own messages about it are left out; what they say of anything else is shown.
    """
    said = _OneLine(what)
    handlers = [handler for name in ("huggingface_hub", "datasets") for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(said)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(said)


class _OneLine(logging.Filter):
    def __init__(self, what: str) -> None:
        super().__init__()
        self._what, self._why = what, ""
        self._last: logging.LogRecord | None = None  # each handler asks about the same record

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the library may print its message."""
        message = record.getMessage()
        if failed := _FAILED.match(message):
            self._why = f" ({failed['why']})"
            return False
        if not (again := _AGAIN.search(message)):
            return True
        if again["number"] == "1" and record is not self._last:
            most, first = int(again["most"]), float(again["wait"])
            doubles = message.startswith("Retrying")
            seconds = sum(min(first * 2**i, max(first, _LONGEST_WAIT_S)) if doubles else first for i in range(most))
            print(
                f"{self._what}: the Hugging Face hub does not answer{self._why}; trying again up to {most} times, "
                f"with pauses of {seconds:.0f} s in all",
                file=sys.stderr,
                flush=True,
            )
        self._last = record
        return False

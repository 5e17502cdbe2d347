"""How far an evaluation is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bars

from megatrain.data.progress_line import LINE_EVERY_S


class Progress:
    """Shows how many requests of a kind are done, on standard error; `what` begins each line."""

    def __init__(self, what: str = "evaluating") -> None:
        self._what = what

    @contextmanager
    def of(self, kind: str, total: int) -> Iterator[Callable[[], None]]:
        """Show `total` requests of a kind; the function that is given is to be called after each."""
        console = Console(stderr=True)
        if console.is_terminal:
            with Bars(console=console, transient=True) as bars:
                bar = bars.add_task(f"{self._what}: {kind}", total=total)
                yield lambda: bars.advance(bar)
            return
        done, told = 0, time.monotonic()

        def advance() -> None:
            nonlocal done, told
            done += 1
            if time.monotonic() - told >= LINE_EVERY_S:
                told = time.monotonic()
                share = f"{100 * done / total:.0f}%"
                print(f"{self._what}: {done:,}/{total:,} {kind} ({share})", file=sys.stderr, flush=True)

        yield advance

"""What `megatrain inspect` and `evaluate` print with: facts; tables, plain columns but on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unicodedata import category

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatrain.config.plain import plain
from megatrain.resilience.colours import are_wanted

MARK = "green"
"""The colour of marked text on a terminal with colours."""
OPENING, CLOSING = "[[", "]]"
"""What encloses marked text elsewhere."""


class Printer:
    """Print rich tables on a terminal and plain, aligned columns elsewhere."""

    def __init__(self, stderr: bool = False) -> None:
        self._console = console = Console(highlight=False, soft_wrap=True, stderr=stderr)
        self._has_colours = console.is_terminal and are_wanted() and console.color_system is not None

    def title(self, text: str) -> None:
        """Print a headline."""
        self._console.print(Text(text, style="bold"))

    def line(self, text: str) -> None:
        """Print one line as it is."""
        self._console.print(Text(text))

    def marked(self, pieces: Sequence[tuple[str, bool]]) -> None:
        """Print text of which some pieces are marked: in colour where there are colours, else between `[[` and `]]`."""
        text, was_marked = Text(), False
        for piece, is_marked in [*pieces, ("", False)]:
            if is_marked != was_marked and not self._has_colours:
                text.append(OPENING if is_marked else CLOSING)
            text.append(piece, style=MARK if is_marked else "")
            was_marked = is_marked
        self._console.print(text)

    def legend(self, what: str) -> str:
        """Return a sentence about how `marked` shows `what`."""
        how = f"in {MARK}" if self._has_colours else f"between {OPENING} and {CLOSING}"
        return f"{what} is {how}"

    def facts(self, values: dict[str, Any]) -> None:
        """Print `name: value` for each value that is not None, with the values in one column."""
        known = {f"{name}:": plain(value) for name, value in values.items() if value is not None}
        width = max(map(len, known), default=0)
        for name, value in known.items():
            self.line(f"{name:{width}} {value}")

    def table(self, title: str, columns: Sequence[str], rows: list[list[str]]) -> None:
        """Print a table, or nothing if there are no rows."""
        if not rows:
            return
        if self._console.is_terminal:
            table = Table(title=Text(title), title_justify="left")
            for column in columns:
                table.add_column(column, overflow="fold")
            for row in rows:
                table.add_row(*map(Text, row))
            self._console.print(table, soft_wrap=False)
            return
        widths = [max(len(row[index]) for row in [list(columns), *rows]) for index in range(len(columns))]
        self.line(f"{title}:")
        for row in [list(columns), *rows]:
            self.line("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """Return text that cannot steer a terminal: control and invisible characters except newline and tab as escapes."""
    return "".join(c if c in "\n\t" or category(c)[0] != "C" else c.encode("unicode_escape").decode() for c in text)

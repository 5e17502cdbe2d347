"""FineWeb's own quality rules (Penedo et al. 2024, arXiv 2406.17557, 3.6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatrain.config import key
from megatrain.data.corpus.characters import LINE_ENDS
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.splitting import LANGUAGES, require_splitter, words_of
from megatrain.data.corpus.steps.gopher_repetition import repeats


@dataclass(frozen=True)
class FinewebQuality(Step):
    """Remove documents that look like lists or menus: FineWeb's own rules (Penedo et al. 2024, arXiv 2406.17557, 3.6).

    Blank lines do not count, except for line breaks. All thresholds are the paper's; null turns a rule off.
    """

    name: ClassVar[str] = "fineweb_quality"
    language: str = key("en", "language that words are split by", choices=LANGUAGES)
    min_ended_lines: float | None = key(0.12, "smallest fraction of lines that end a sentence", minimum=0)
    max_short_lines: float | None = key(0.67, "largest fraction of short lines", minimum=0)
    short_line_characters: int = key(30, "longest short line, in characters", minimum=0)
    max_duplicate_characters: float | None = key(
        0.01, "largest fraction of characters in repeated lines, line breaks left out", minimum=0
    )
    max_line_breaks: float | None = key(0.3, "most line breaks for each word", minimum=0)

    def __post_init__(self) -> None:
        require_splitter(self.language, self.name)

    def apply(self, document: Document) -> Removal | None:
        """Compare the lines with each rule."""
        text = document.text
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return Removal("empty", "no text")
        ended = sum(line[-1] in LINE_ENDS for line in lines) / len(lines)
        if self.min_ended_lines is not None and ended < self.min_ended_lines:
            return Removal("few_ended_lines", f"{ended:.3f} of the lines, less than {self.min_ended_lines}")
        short = sum(len(line) <= self.short_line_characters for line in lines) / len(lines)
        if self.max_short_lines is not None and short > self.max_short_lines:
            return Removal("short_lines", f"{short:.3f} of the lines, more than {self.max_short_lines}")
        breaks = text.count("\n")
        repeated = repeats(lines)[1] / (len(text) - breaks)
        if self.max_duplicate_characters is not None and repeated > self.max_duplicate_characters:
            return Removal(
                "duplicate_lines", f"{repeated:.3f} of the characters, more than {self.max_duplicate_characters}"
            )
        # There are at least as many words as runs without whitespace, so most documents need not be split.
        if self.max_line_breaks is not None and breaks / len(text.split()) > self.max_line_breaks:
            figure = breaks / len(words_of(document, self.language))
            if figure > self.max_line_breaks:
                return Removal("line_breaks", f"{figure:.3f} for each word, more than {self.max_line_breaks}")
        return None

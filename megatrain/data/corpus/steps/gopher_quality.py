"""Gopher's quality rules (Rae et al. 2021, arXiv 2112.11446, A1.1)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from megatrain.config import key
from megatrain.data.corpus.characters import SYMBOLS
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.splitting import LANGUAGES, require_splitter, words_of

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")


@dataclass(frozen=True)
class GopherQuality(Step):
    """Remove documents that do not look like prose: Gopher's quality rules (Rae et al. 2021, arXiv 2112.11446, A1.1).

    All thresholds are the paper's, for English; null turns a rule off. Symbols (punctuation marks) are words too,
    except for the number of words and their mean length. A word is what spaCy calls a token, in Chinese jieba.
    """

    name: ClassVar[str] = "gopher_quality"
    language: str = key("en", "language that words are split by", choices=LANGUAGES)
    min_words: int | None = key(50, "fewest words", minimum=0)
    max_words: int | None = key(100_000, "most words", minimum=1)
    min_mean_word_length: float | None = key(3, "shortest mean length of words, in characters", minimum=0)
    max_mean_word_length: float | None = key(10, "longest mean length of words, in characters", minimum=0)
    max_symbols: float | None = key(0.1, "most hash signs, and most ellipses, for each word", minimum=0)
    max_bullet_lines: float | None = key(0.9, "largest fraction of lines that begin with a bullet", minimum=0)
    max_ellipsis_lines: float | None = key(0.3, "largest fraction of lines that end with an ellipsis", minimum=0)
    min_alphabetic_words: float | None = key(0.8, "smallest fraction of words that have a letter", minimum=0)
    min_stop_words: int | None = key(2, "fewest different stop words", minimum=0)
    stop_words: list[str] = key(list(STOP_WORDS), "the stop words")

    def __post_init__(self) -> None:
        require_splitter(self.language, self.name)

    def apply(self, document: Document) -> Removal | None:
        """Compare the document with each rule, in the paper's order."""
        words = words_of(document, self.language)
        total, plain, characters, alphabetic = len(words), 0, 0, 0
        counts = Counter(words)
        for word, count in counts.items():
            if word.strip(SYMBOLS):
                plain += count
                characters += count * len(word)
            if word.isalpha() or any(map(str.isalpha, word)):
                alphabetic += count
        if not words or (self.min_words is not None and plain < self.min_words):
            return Removal("too_few_words", f"{plain} words, fewer than {self.min_words}")
        if self.max_words is not None and plain > self.max_words:
            return Removal("too_many_words", f"{plain} words, more than {self.max_words}")
        mean = characters / plain if plain else float("nan")
        if self.min_mean_word_length is not None and mean < self.min_mean_word_length:
            return Removal("short_words", f"words of {mean:.2f} characters, fewer than {self.min_mean_word_length}")
        if self.max_mean_word_length is not None and mean > self.max_mean_word_length:
            return Removal("long_words", f"words of {mean:.2f} characters, more than {self.max_mean_word_length}")
        return (
            self._too_many("hash_signs", document.text.count("#") / total, self.max_symbols, "hash signs a word")
            or self._too_many(
                "ellipses", sum(map(document.text.count, _ELLIPSES)) / total, self.max_symbols, "ellipses a word"
            )
            or self._lines(document.text.splitlines())
            or self._too_few_letters(alphabetic / total)
            or self._too_few_stop_words(counts)
        )

    @staticmethod
    def _too_many(rule: str, figure: float, most: float | None, what: str) -> Removal | None:
        if most is not None and figure > most:
            return Removal(rule, f"{figure:.3f} {what}, more than {most}")
        return None

    def _lines(self, lines: list[str]) -> Removal | None:
        bullets = sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines)
        ellipses = sum(line.rstrip().endswith(_ELLIPSES) for line in lines) / len(lines)
        return self._too_many(
            "bullet_lines", bullets, self.max_bullet_lines, "of the lines begin with a bullet"
        ) or self._too_many("ellipsis_lines", ellipses, self.max_ellipsis_lines, "of the lines end with an ellipsis")

    def _too_few_letters(self, fraction: float) -> Removal | None:
        if self.min_alphabetic_words is not None and fraction < self.min_alphabetic_words:
            detail = f"{fraction:.3f} of the words have a letter, less than {self.min_alphabetic_words}"
            return Removal("few_alphabetic_words", detail)
        return None

    def _too_few_stop_words(self, counts: Counter[str]) -> Removal | None:
        found = sum(word in counts for word in set(self.stop_words))
        if self.min_stop_words is not None and found < self.min_stop_words:
            return Removal("few_stop_words", f"{found} stop words, fewer than {self.min_stop_words}")
        return None

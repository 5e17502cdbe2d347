"""Gopher's repetition rules (Rae et al. 2021, arXiv 2112.11446, table A1)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.splitting import LANGUAGES, require_splitter, words_of

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, of the polynomial that hashes characters, modulo 2^64


@dataclass(frozen=True)
class GopherRepetition(Step):
    """Remove documents that repeat themselves: Gopher's rules (Rae et al. 2021, arXiv 2112.11446, table A1).

    All thresholds are the paper's; null turns a rule off. Characters are counted as fractions of the whole text.
    """

    name: ClassVar[str] = "gopher_repetition"
    language: str = key("en", "language that words are split by", choices=LANGUAGES)
    max_duplicate_paragraphs: float | None = key(0.3, "largest fraction of repeated paragraphs", minimum=0)
    max_duplicate_paragraph_characters: float | None = key(0.2, "the same, of their characters", minimum=0)
    max_duplicate_lines: float | None = key(0.3, "largest fraction of repeated lines", minimum=0)
    max_duplicate_line_characters: float | None = key(0.2, "the same, of their characters", minimum=0)
    max_top_2_gram: float | None = key(0.2, "largest fraction of characters in the commonest 2 words", minimum=0)
    max_top_3_gram: float | None = key(0.18, "the same of the commonest 3 words", minimum=0)
    max_top_4_gram: float | None = key(0.16, "the same of the commonest 4 words", minimum=0)
    max_duplicate_5_grams: float | None = key(0.15, "largest fraction of characters in repeated 5 words", minimum=0)
    max_duplicate_6_grams: float | None = key(0.14, "the same of 6 words", minimum=0)
    max_duplicate_7_grams: float | None = key(0.13, "the same of 7 words", minimum=0)
    max_duplicate_8_grams: float | None = key(0.12, "the same of 8 words", minimum=0)
    max_duplicate_9_grams: float | None = key(0.11, "the same of 9 words", minimum=0)
    max_duplicate_10_grams: float | None = key(0.1, "the same of 10 words", minimum=0)

    def __post_init__(self) -> None:
        require_splitter(self.language, self.name)

    def apply(self, document: Document) -> Removal | None:
        """Compare the document with each rule, in the order of the table."""
        text = document.text
        if not text:
            return Removal("empty", "no text")
        return (
            _duplicates("paragraph", re.split(r"\n{2,}", text.strip()), len(text), self.max_duplicate_paragraphs,
                        self.max_duplicate_paragraph_characters)
            or _duplicates("line", re.split(r"\n+", text), len(text), self.max_duplicate_lines,
                           self.max_duplicate_line_characters)
            or self._words(words_of(document, self.language), len(text))
        )  # fmt: skip

    def _words(self, words: list[str], size: int) -> Removal | None:
        index = {word: number for number, word in enumerate(dict.fromkeys(words))}
        numbers = np.fromiter(map(index.__getitem__, words), np.int64, len(words))
        for n, most in ((2, self.max_top_2_gram), (3, self.max_top_3_gram), (4, self.max_top_4_gram)):
            if most is not None and len(words) >= n:
                figure = top_n_gram(words, numbers, len(index), n) / size
                if figure > most:
                    return Removal(f"top_{n}_gram", f"{figure:.3f} of the characters, more than {most}")
        hashes = PrefixHashes(words)
        for n, most in (
            (5, self.max_duplicate_5_grams),
            (6, self.max_duplicate_6_grams),
            (7, self.max_duplicate_7_grams),
            (8, self.max_duplicate_8_grams),
            (9, self.max_duplicate_9_grams),
            (10, self.max_duplicate_10_grams),
        ):
            if most is not None:
                figure = hashes.repeated_characters(n) / size
                if figure > most:
                    return Removal(f"duplicate_{n}_grams", f"{figure:.3f} of the characters, more than {most}")
        return None


def _duplicates(
    what: str, parts: list[str], size: int, most: float | None, most_characters: float | None
) -> Removal | None:
    """Compare the parts that were there before, and their characters, with what is allowed."""
    repeated, characters = 0, 0
    if len(set(parts)) < len(parts):
        repeated, characters = repeats(parts)
    if most is not None and repeated / len(parts) > most:
        return Removal(f"duplicate_{what}s", f"{repeated / len(parts):.3f} of the {what}s, more than {most}")
    if most_characters is not None and characters / size > most_characters:
        detail = f"{characters / size:.3f} of the characters, more than {most_characters}"
        return Removal(f"duplicate_{what}_characters", detail)
    return None


def repeats(parts: list[str]) -> tuple[int, int]:
    """Return how many parts were there before, and their characters."""
    seen: set[str] = set()
    repeated = characters = 0
    for part in parts:
        if part in seen:
            repeated += 1
            characters += len(part)
        else:
            seen.add(part)
    return repeated, characters


def top_n_gram(words: list[str], numbers: np.ndarray, num_distinct: int, n: int) -> int:
    """Return the characters, spaces included, of all occurrences of the commonest n-gram; the first of equals.

    `numbers` are the words as numbers below `num_distinct`; there are at least n words.
    """
    if num_distinct**n >= 2**63:  # an n-gram does not fit into one number
        counted = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        gram, count = max(counted.items(), key=lambda item: item[1])
        return len(" ".join(gram)) * count
    grams = numbers[: len(numbers) - n + 1]
    for i in range(1, n):
        grams = grams * num_distinct + numbers[i : len(numbers) - n + 1 + i]
    order = np.argsort(grams, kind="stable")
    ordered = grams[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    counts = np.diff(starts, append=len(ordered))
    count = int(counts.max())
    first = int(order[starts[counts == count]].min())
    return len(" ".join(words[first : first + n])) * count


class PrefixHashes:
    """Finds repeated n-grams: equal characters, spaces left out, wherever the words begin."""

    def __init__(self, words: list[str]) -> None:
        """Hash each prefix of the words' characters."""
        self._text = "".join(words)
        codes = np.frombuffer(self._text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        powers = np.full(len(codes) + 1, _BASE)
        powers[0] = 1
        self._powers = np.cumprod(powers)
        self._ends = np.cumsum([0, *map(len, words)])
        prefixes = np.concatenate((np.zeros(1, np.uint64), np.cumsum(codes * self._powers[:-1])))
        self._prefixes = prefixes[self._ends]

    def repeated_characters(self, n: int) -> int:
        """Return the characters of n-grams that were there before; the search goes on behind each such one."""
        starts, ends = self._ends[:-n], self._ends[n:]
        if len(starts) < 2:
            return 0
        # the hash of a part, moved to where the last character's power is the same for all
        hashes = (self._prefixes[n:] - self._prefixes[:-n]) * self._powers[len(self._powers) - 1 - starts]
        order = np.argsort(hashes)
        ordered = hashes[order]
        equal = ordered[1:] == ordered[:-1]
        if not equal.any():
            return 0
        several = np.concatenate(([False], equal)) | np.concatenate((equal, [False]))
        seen: set[str] = set()
        repeated = free = 0
        for place in np.sort(order[several]).tolist():
            if place < free:
                continue
            gram = self._text[starts[place] : ends[place]]
            if gram in seen:
                repeated += len(gram)
                free = place + n
            else:
                seen.add(gram)
        return repeated

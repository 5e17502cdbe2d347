"""What augmenting steps share: which documents they work on, their random numbers, and how text is cut into sentences.

An augmenting step changes some documents, drawn by its seed and the document's id alone, so that the result does not
depend on how the work was divided. None is part of a recipe unless it is named there.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step

_MARKS = re.compile(r"([.!?]+)[\"'”’)\]]*|([。！？；…]+)[\"'”’」』）》]*")
_SPACE = re.compile(r"\s*")
_ABBREVIATED = re.compile(
    r"(?:\b[A-Za-z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|cf|al|No|Fig|Eq|pp|approx|Inc|Ltd))\.$|\betc\.$"
)
_LONGEST_ABBREVIATION = 16


@dataclass(frozen=True)
class Augmentation(Step):
    """A step that changes a share of the documents."""

    rate: float = key(0.1, "share of the documents to augment", minimum=0, maximum=1)
    seed: int = key(0, "seed of what is changed, and how", minimum=0)
    keep_original: bool = key(False, "keep the original beside the augmented document, instead of replacing it")

    def apply(self, document: Document) -> Removal | None:
        """Augment the document, if it is drawn."""
        seed = xxhash.xxh3_64_intdigest(f"{self.name}\0{document.id}".encode(errors="surrogatepass"), seed=self.seed)
        draw = random.Random(seed)
        if draw.random() < self.rate:
            text = self.augmented(document, draw)
            if text != document.text:
                document.augment(text, self.name, self.keep_original)
                document.count("augmented")
            else:
                document.count("unchanged")
        return None

    @abstractmethod
    def augmented(self, document: Document, draw: random.Random) -> str:
        """Return the document's text, augmented; the same text if there is nothing to change."""


def sentences(line: str) -> list[tuple[str, str]]:
    """Return the sentences of a line, English or Chinese, each with the whitespace after it; joined they are the line.

    A sentence ends with `.`, `!` or `?` before whitespace, or with `。！？；…`, and the quotation marks and brackets
    after it. It does not end after an initial or an abbreviation, nor before a small letter.
    """
    indent = line[: len(line) - len(line.lstrip())]
    found = [("", indent)] if indent else []
    start = stop = len(indent)  # of the sentence so far, which ends here unless it goes on
    for begin, end in _parts(line, len(indent)):
        last = line[max(start, stop - _LONGEST_ABBREVIATION) : stop]
        if last and not (_ABBREVIATED.search(last) or line[begin].islower()):
            found.append((line[start:stop], line[stop:begin]))
            start = begin
        stop = end
    if start < len(line):
        found.append((line[start:stop], line[stop:]))
    return found


def _parts(line: str, start: int) -> Iterator[tuple[int, int]]:
    """Yield where each part of a line starts and stops that ends like a sentence, or with the line.

    Time is linear in the line's length, whatever marks it has.
    """
    for marks in _MARKS.finditer(line, start):
        english, chinese = marks[1], marks[2]
        if english and marks.end() < len(line) and not line[marks.end()].isspace():
            continue
        if marks.start() == start and len(english or chinese) == 1:  # nothing but a mark is no sentence
            continue
        yield start, marks.end()
        space = _SPACE.match(line, marks.end())
        assert space is not None
        start = space.end()
    if start < len(line):
        yield start, len(line)

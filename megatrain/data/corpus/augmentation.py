"""What augmenting steps share: which documents they work on, their random numbers, and how text is cut into sentences.

An augmenting step changes some documents, drawn by its seed and the document's id alone, so that the result does not
depend on how the work was divided. None is part of a recipe unless it is named there.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from dataclasses import dataclass

import xxhash

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step

_ENGLISH_END = r"[.!?]+[\"'”’)\]]*(?=\s|$)"
_CHINESE_END = r"[。！？；…]+[\"'”’」』）》]*"
_SENTENCE = re.compile(rf"(.+?(?:{_ENGLISH_END}|{_CHINESE_END}|$))(\s*)")
_ABBREVIATED = re.compile(
    r"(?:\b[A-Za-z]|\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|cf|al|No|Fig|Eq|pp|approx|Inc|Ltd))\.$|\betc\.$"
)


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
    found: list[tuple[str, str]] = []
    indent = line[: len(line) - len(line.lstrip())]
    for text, gap in _SENTENCE.findall(line[len(indent) :]):
        before, space = found[-1] if found else ("", "")
        goes_on = before and (_ABBREVIATED.search(before) or text[0].islower())
        if goes_on:
            found[-1] = before + space + text, gap
        else:
            found.append((text, gap))
    return [("", indent), *found] if indent else found

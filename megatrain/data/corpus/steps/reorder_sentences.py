"""Augment documents by putting sentences in another order."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from megatrain.config import key
from megatrain.data.corpus.augmentation import Augmentation, sentences
from megatrain.data.corpus.document import Document


@dataclass(frozen=True)
class ReorderSentences(Augmentation):
    """Put the sentences of each line of some documents in another order: English and Chinese ones.

    Lines stay in their places, and so does the whitespace between sentences. Sentences move by a few places at most, or
    anywhere in their line. (Shuffled sentences are one of the noises of BART: Lewis et al. 2020, arXiv 1910.13461.)
    """

    name: ClassVar[str] = "reorder_sentences"
    distance: int | None = key(None, "places that a sentence moves at most; null for any", minimum=1)

    def augmented(self, document: Document, draw: random.Random) -> str:
        """Return the text with the sentences of its lines reordered."""
        return "\n".join(self._reordered(line, draw) for line in document.text.split("\n"))

    def _reordered(self, line: str, draw: random.Random) -> str:
        found = sentences(line)
        movable = [at for at, (text, _) in enumerate(found) if text]
        if len(movable) < 2:
            return line
        # Sorted by place plus a random offset below distance + 1 (Lample et al. 2018, arXiv 1711.00043).
        reach = len(movable) if self.distance is None else self.distance + 1
        order = sorted(range(len(movable)), key=lambda place: place + reach * draw.random())
        texts = [found[movable[place]][0] for place in order]
        for at, text in zip(movable, texts, strict=True):
            found[at] = text, found[at][1]
        return "".join(text + gap for text, gap in found)

"""Augment documents by misspellings."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import ClassVar

from megatrain.config import key
from megatrain.data.corpus.augmentation import Augmentation
from megatrain.data.corpus.document import Document
from megatrain.errors import ConfigError

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> dict[str, str]:
    """Return the letters beside each letter on an English keyboard: in its row, and in those above and below."""
    places = {letter: (row, at) for row, letters in enumerate(_ROWS) for at, letter in enumerate(letters)}
    return {
        letter: "".join(
            other
            for other, (other_row, other_at) in places.items()
            if other != letter and abs(other_row - row) <= 1 and abs(other_at - at) <= 1
        )
        for letter, (row, at) in places.items()
    }


_BESIDE = _neighbours()


@dataclass(frozen=True)
class Noise(Augmentation):
    """Misspell letters of some documents, Chinese characters too: swap neighbours, drop, repeat, or hit the next key.

    Each letter is changed with the probabilities below, which add up to at most 1. Only letters are; whitespace, digits
    and punctuation stay. The keys are those of an English keyboard, so only Latin letters are mistyped.
    """

    name: ClassVar[str] = "noise"
    swap: float = key(0.01, "probability that a letter changes places with the next one", minimum=0, maximum=1)
    drop: float = key(0.01, "probability that a letter is left out", minimum=0, maximum=1)
    repeat: float = key(0.0, "probability that a letter is written twice", minimum=0, maximum=1)
    typo: float = key(0.01, "probability that a letter is one beside it on the keyboard", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        total = math.fsum((self.swap, self.drop, self.repeat, self.typo))
        if total > 1:
            raise ConfigError(f"clean.steps: noise: swap, drop, repeat and typo add up to {total}, more than 1")

    def augmented(self, document: Document, draw: random.Random) -> str:
        """Return the misspelt text."""
        text, written = document.text, []
        at = 0
        while at < len(text):
            letter = text[at]
            at += 1
            if not letter.isalpha():
                written.append(letter)
                continue
            chance = draw.random()
            if (chance := chance - self.swap) < 0:
                if at < len(text) and text[at].isalpha():
                    written.append(text[at])
                    at += 1
                written.append(letter)
            elif (chance := chance - self.drop) < 0:
                pass
            elif (chance := chance - self.repeat) < 0:
                written.append(letter * 2)
            elif chance - self.typo < 0 and (beside := _BESIDE.get(letter.lower())):
                other = beside[int(draw.random() * len(beside))]
                written.append(other.upper() if letter.isupper() else other)
            else:
                written.append(letter)
        return "".join(written)

"""Augment conversations by exchanges of others."""

from __future__ import annotations

import random
import re
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

from megatrain.config import key
from megatrain.data.corpus.augmentation import Augmentation
from megatrain.data.corpus.document import Document, Removal

_EXCHANGE = re.compile(r"(?:\A|\n\n)(?=User: )")
_REMEMBERED = 1024
"""Exchanges of earlier conversations to draw from."""


@dataclass(frozen=True)
class MixTurns(Augmentation):
    """Replace exchanges of some conversations by exchanges of others that came before in the same source.

    An exchange is a question (`User: ...`) with all that follows up to the next question: answers stay with their
    questions. Each exchange of a conversation is replaced with probability `exchange_rate`, by one of the latest 1,024
    of the conversations before it in the same part of the source, which its files alone decide. So the first
    conversation of a part stays as it is. Only records that are lists of messages are conversations. An exchange of a
    held-out conversation may come into one to train on: hold out another corpus to measure with.
    """

    name: ClassVar[str] = "mix_turns"
    exchange_rate: float = key(0.5, "share of a conversation's exchanges to replace", minimum=0, maximum=1)

    def apply(self, document: Document) -> Removal | None:
        """Augment the conversation, if it is drawn, and remember its own exchanges for those after it."""
        if document.kind != "conversation":
            return None
        own = _exchanges(document.text)[1:]
        super().apply(document)
        self._earlier(document).extend(own)
        return None

    def augmented(self, document: Document, draw: random.Random) -> str:
        """Return the conversation with some exchanges replaced."""
        earlier = self._earlier(document)
        if not earlier:
            return document.text
        begin, *own = _exchanges(document.text)
        mixed = [
            earlier[int(draw.random() * len(earlier))] if draw.random() < self.exchange_rate else exchange
            for exchange in own
        ]
        document.count("exchanges", sum(a is not b for a, b in zip(own, mixed, strict=True)))
        return "\n\n".join([*([begin] if begin else []), *mixed])

    def _earlier(self, document: Document) -> deque[str]:
        found: deque[str] = document.memory.setdefault(f"{self.name} {self.seed}", deque(maxlen=_REMEMBERED))
        return found


def _exchanges(text: str) -> list[str]:
    """Return what precedes the first question (maybe nothing), and each question with its answers."""
    return _EXCHANGE.split(text)

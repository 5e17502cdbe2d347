"""Remove documents by their length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step


@dataclass(frozen=True)
class Length(Step):
    """Remove documents that are shorter or longer than a number of characters."""

    name: ClassVar[str] = "length"
    min_characters: int = key(1, "shortest document to keep, in characters", minimum=0)
    max_characters: int | None = key(None, "longest document to keep, in characters; null for any", minimum=1)

    def apply(self, document: Document) -> Removal | None:
        """Compare the length with the bounds."""
        length = len(document.text)
        if length < self.min_characters:
            return Removal("too_short", f"{length} characters, fewer than {self.min_characters}")
        if self.max_characters is not None and length > self.max_characters:
            return Removal("too_long", f"{length} characters, more than {self.max_characters}")
        return None

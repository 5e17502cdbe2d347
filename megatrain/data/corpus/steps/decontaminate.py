"""Remove what documents share with evaluation sets."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.evaluation_sets import EvaluationSet, find_sets
from megatrain.data.corpus.ngram_table import FORMAT, NgramTable, write_table
from megatrain.data.corpus.shared_files import own_folder, shared_file
from megatrain.errors import ConfigError


@dataclass(frozen=True)
class Decontaminate(Step):
    """Remove documents, or the passages in them, that share a word n-gram with an evaluation set.

    Case, punctuation, accents and spacing do not count; a Chinese character is a word. The defaults of n-gram, margin
    and pieces are GPT-3's (Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C). An evaluation text
    of fewer words than an n-gram, but at least 8, is looked for as a whole. A set is a file of text, `.jsonl` or
    `.json`, also compressed; of a record's texts those in `fields` count, or all. A changed file makes another dataset.
    The table, 24 bytes an n-gram, is a file that all workers map, so that memory holds it once at most.
    """

    name: ClassVar[str] = "decontaminate"
    sets: list[Any] = key(
        [],
        "evaluation sets: paths of files, or {path: ..., name: ..., fields: [question,answer]}",
    )
    ngram: int = key(13, "words that a document and a set must share in a row", minimum=1)
    action: str = key("drop", "drop the document, or cut the shared passages out of it", choices=("drop", "cut"))
    margin: int = key(200, "characters that cut removes on either side as well", minimum=0)
    min_piece: int = key(200, "characters; shorter pieces that cut leaves are removed", minimum=0)
    max_pieces: int = key(10, "pieces; a document that cut leaves in more is dropped", minimum=1)

    def __post_init__(self) -> None:
        try:
            found = find_sets(self.sets)
        except ConfigError as error:
            raise ConfigError(f"clean.steps: decontaminate.{error}") from error
        object.__setattr__(self, "_found", found)  # no parameters: what the files hold now, and where the table is
        object.__setattr__(self, "_place", None)

    @property
    def _sets(self) -> tuple[EvaluationSet, ...]:
        found: tuple[EvaluationSet, ...] = self.__dict__["_found"]
        return found

    def settings(self) -> dict[str, Any]:
        """Return the parameters, and digests of the sets' files."""
        return asdict(self) | {"digests": {one.name: one.digest for one in self._sets}}

    def share(self, folder: Path) -> None:
        """Write the table of the sets' n-grams."""
        settings = json.dumps([FORMAT, self.ngram, [asdict(one) for one in self._sets]])
        name = f"ngrams_{xxhash.xxh3_128_hexdigest(settings.encode())}"
        place = shared_file(folder, name, functools.partial(write_table, self._sets, self.ngram))
        object.__setattr__(self, "_place", place)

    def apply(self, document: Document) -> Removal | None:
        """Look the document's n-grams up."""
        if self.__dict__["_place"] is None:
            self.share(own_folder())
        table = _table(self.__dict__["_place"])
        if self.action == "drop":
            hit = next(table.find(document.text), None)
            return self._removal(document, hit.set, hit.start, hit.stop) if hit else None
        hits = list(table.find(document.text))
        if not hits:
            return None
        for number in sorted({hit.set for hit in hits}):
            spans = _merge([(hit.start, hit.stop) for hit in hits if hit.set == number])
            document.count(self._sets[number].name, len(spans))
        cuts = _merge([(max(0, hit.start - self.margin), hit.stop + self.margin) for hit in hits])
        edges = [0, *(edge for cut in cuts for edge in cut), len(document.text)]
        pieces = [document.text[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        pieces = [piece for piece in pieces if piece and len(piece) >= self.min_piece]
        if len(pieces) > self.max_pieces:
            return Removal("many_pieces", f"{len(pieces)} pieces are left, more than {self.max_pieces}")
        if not pieces:
            return self._removal(document, hits[0].set, hits[0].start, hits[0].stop)
        document.text = "\n".join(pieces)
        return None

    def _removal(self, document: Document, number: int, start: int, stop: int) -> Removal:
        name = self._sets[number].name
        return Removal(name, f"shares with the set {name}: {document.text[start:stop]}")


def _merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the union of spans, in order."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


@functools.lru_cache(maxsize=8)
def _table(place: Path) -> NgramTable:
    """Open a table once in each process."""
    return NgramTable(place)

"""The prose that the base model of the toy world is trained on, as a source of `megatrain prepare`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from megatrain.config import DataConfig
from megatrain.data.corpus.record import Record
from megatrain.data.corpus.shard import Shard
from megatrain.data.corpus.source import Source, num_bytes
from megatrain.data.toy.records import FOLDER, write_records
from megatrain.data.toy.world import LANGUAGES, draw

DOCUMENTS, LINES = 12_000, 16
"""Documents of the corpus, and lines of each."""

_EDITION = 2
"""Number of the corpus: another one has other text, or other files beside it."""


class ToySource(Source):
    """Documents of a few lines of prose, each in one language, and the files to tune on beside them."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.identity = {"kind": config.kind, "edition": _EDITION}
        self.total_bytes = None

    def shards(self) -> Iterator[Shard]:
        """Yield one shard with all documents."""
        yield Shard(stamps=(f"edition {_EDITION}",), stop=DOCUMENTS)

    def read(self, shard: Shard) -> Iterator[Record]:
        """Yield the documents, each a pure function of its number."""
        for number in range(shard.start, shard.stop or DOCUMENTS):
            rng = random.Random(number)
            facts = draw(LINES, number, languages=(LANGUAGES[number % 2],))
            text = "".join(fact.line(rng) + "\n" for fact in facts)
            self.progress.bytes += num_bytes(text)
            yield Record(text, f"data=toy, document {number + 1}").within("toy", 0, number)

    def write_beside(self, folder: Path) -> list[Path]:
        """Write the files to tune on; return them."""
        records = folder / FOLDER
        records.mkdir()
        return write_records(records)

"""Which documents of a cleaned corpus are kept, held out, and used to train the tokenizer. Reads no text.

A flag per document, in corpus order, names its split. All of it depends on the documents alone, not on how the work was
divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import xxhash

from megatrain.data.corpus.cleaned import CleanedShard
from megatrain.errors import DataError

DROPPED, TRAIN, HELDOUT, NEAR_DUPLICATE = 0, 1, 2, 3
"""Flags: an exact duplicate, those that are kept, and a near duplicate."""

_BYTES_A_DOCUMENT = 96  # of memory, while duplicates are sorted


class Selection:
    """The cleaned shards of a corpus and the flags of their documents, which live in the file `path`.

    The file is created with every document to be trained on; with `decided` it exists and is only read.
    """

    def __init__(self, shards: Sequence[CleanedShard], path: Path, decided: bool = False) -> None:
        self.shards, self.path = shards, path
        self.starts = list(accumulate((shard.num_documents for shard in shards), initial=0))
        self.num_documents = self.starts.pop()
        if self.num_documents:
            self.flags: np.ndarray = np.memmap(path, np.uint8, "r" if decided else "w+", shape=(self.num_documents,))
        else:  # an empty file cannot be mapped
            self.flags = np.zeros(0, np.uint8)
        if not decided:
            self.flags[:] = TRAIN

    def hash_flags(self) -> str:
        """Return the xxh3-128 of the flags."""
        return xxhash.xxh3_128_hexdigest(self.flags)  # type: ignore[arg-type]  # an array is a buffer

    def flags_of(self, shard: int) -> np.ndarray:
        """Return the flags of a shard's documents; writing to them changes them."""
        return self.flags[self.starts[shard] : self.starts[shard] + self.shards[shard].num_documents]

    def locate(self, document: int) -> tuple[int, int]:
        """Return the shard that holds a document, and the document's index in it."""
        shard = int(np.searchsorted(self.starts, document, side="right")) - 1
        return shard, document - self.starts[shard]

    def drop_duplicates(self, memory_bytes: int) -> int:
        """Drop all but the first of the documents of equal text, in at most `memory_bytes`; return how many.

        Documents are sorted by hash in as many passes over the hashes as the memory demands.
        """
        passes = max(1, -(-self.num_documents * _BYTES_A_DOCUMENT // memory_bytes))
        dropped = 0
        for number in range(passes):
            hashes, documents = [np.zeros((0, 2), np.uint64)], [np.zeros(0, np.int64)]
            for start, shard in zip(self.starts, self.shards, strict=True):
                found = shard.documents()["hash"]
                chosen = np.flatnonzero(found[:, 0] % np.uint64(passes) == number)
                hashes.append(found[chosen])
                documents.append(start + chosen)
            values, order = np.concatenate(hashes), np.concatenate(documents)
            by_hash = np.lexsort((values[:, 1], values[:, 0]))  # stable: of equal ones, the first stays first
            values, order = values[by_hash], order[by_hash]
            again = order[1:][(values[1:] == values[:-1]).all(axis=1)]
            self.flags[again] = DROPPED
            dropped += len(again)
        return dropped

    def hold_out(self, fraction: float) -> None:
        """Hold out each document that is kept with probability `fraction`, by its draw; at least one where possible."""
        below = np.uint64(int(fraction * 2**64))
        lowest: tuple[int, int] | None = None  # draw and number of the document to hold out first
        highest: tuple[int, int] | None = None  # the same for the one to hold out last
        for number, shard in enumerate(self.shards):
            flags, draws = self.flags_of(number), shard.documents()["heldout_draw"]
            kept = np.flatnonzero(is_kept(flags))
            if not len(kept):
                continue
            flags[kept] = np.where(draws[kept] < below, HELDOUT, TRAIN)
            by_draw = kept[np.argsort(draws[kept], kind="stable")]
            first, last = ((int(draws[at]), self.starts[number] + int(at)) for at in (by_draw[0], by_draw[-1]))
            lowest, highest = min(lowest or first, first), max(highest or last, last)
        if fraction > 0 and lowest and highest and lowest[0] != highest[0]:
            if not self.count(HELDOUT):
                self._flag_draw(lowest[0], HELDOUT)
            elif not self.count(TRAIN):
                self._flag_draw(highest[0], TRAIN)

    def hold_out_fold(self, fold: int, folds: int) -> None:
        """Hold out one of `folds` equal parts of the kept documents, in the order of their draws; the first is 1.

        Documents of one draw, an original and its augmented copies, are in one fold. Raises `DataError` if there are
        fewer draws than folds.
        """
        draws = np.unique(np.concatenate([self._draws(number)[1] for number in range(len(self.shards))]))
        if len(draws) < folds:
            raise DataError(f"data.folds={folds}: there are {len(draws)} different documents; give fewer folds")
        bounds = draws[[(fold - 1) * len(draws) // folds, fold * len(draws) // folds - 1]]
        for number in range(len(self.shards)):
            kept, of_shard = self._draws(number)
            self.flags_of(number)[kept] = np.where((of_shard >= bounds[0]) & (of_shard <= bounds[1]), HELDOUT, TRAIN)

    def _draws(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the kept documents of a shard, by their index in it, and the draw of each."""
        kept = np.flatnonzero(is_kept(self.flags_of(shard)))
        return kept, self.shards[shard].documents()["heldout_draw"][kept]

    def _flag_draw(self, draw: int, flag: int) -> None:
        """Flag the kept documents of one draw: an original and its augmented copies."""
        for number, shard in enumerate(self.shards):
            flags = self.flags_of(number)
            flags[is_kept(flags) & (shard.documents()["heldout_draw"] == np.uint64(draw))] = flag

    def count(self, flag: int) -> int:
        """Return the number of documents with this flag."""
        return int(np.count_nonzero(self.flags == flag))

    def sample(self, budget: int) -> list[list[int]]:
        """Return a random sample of the documents to train on: each shard's, by their index in it, ascending.

        The documents with the smallest draws are taken, until they have `budget` bytes.
        """
        taken = np.zeros(0, [("draw", "<u8"), ("shard", "<i8"), ("document", "<i8"), ("size", "<i8")])
        for number, shard in enumerate(self.shards):
            known = shard.documents()
            train = np.flatnonzero(self.flags_of(number) == TRAIN)
            offered = np.zeros(len(train), taken.dtype)
            offered["draw"], offered["size"] = known["sample_draw"][train], known["size"][train]
            offered["shard"], offered["document"] = number, train
            both = np.concatenate([taken, offered])
            both = both[np.argsort(both["draw"], kind="stable")]
            before = np.cumsum(both["size"]) - both["size"]
            taken = both[before < budget]
        return [sorted(taken["document"][taken["shard"] == number].tolist()) for number in range(len(self.shards))]


def is_kept(flags: np.ndarray) -> np.ndarray:
    """Return whether each flag is one of a document that is kept, to train on or held out."""
    kept: np.ndarray = (flags == TRAIN) | (flags == HELDOUT)
    return kept

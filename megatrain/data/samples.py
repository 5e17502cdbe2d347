"""The samples of a dataset: what its windows of T+1 tokens hold. Imports no torch.

`Windows` cuts one long sequence of tokens, whatever documents it has; `PackedSamples` fills each window with whole
documents. Which window comes when is not decided here (order.py), nor is its form as tensors (loader.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from megatrain.data.card import Card
from megatrain.data.dataset import Dataset
from megatrain.data.indexed import COUNTS, REJECTED
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.packing import BEGINS, ENDS
from megatrain.data.packing_index import PackingIndex, open_packing
from megatrain.errors import DataError

BEST_FIT = "best_fit"
"""The value of `data.packing` that keeps documents whole; `concatenate` is the other."""


@dataclass(frozen=True)
class Sample:
    """Up to T+1 ids (int64): inputs are all but the last, and each is the label of the one before it.

    `pieces` has the tokens of each document or piece of one, in order, if they are known; they sum to the number of
    ids. `unrelated` has the inputs (their indices) whose next id is no continuation, because it or they are part of a
    document that was cut. `counts` (bool) has which ids count as labels, if not all do. `pairs` are the numbers of the
    preference pairs in the dataset (int64), whose chosen and rejected sides are the pieces, in turn.
    """

    ids: np.ndarray
    pieces: list[int] | None = None
    unrelated: tuple[int, ...] = ()
    counts: np.ndarray | None = None
    pairs: np.ndarray | None = None


class Samples(Protocol):
    """The windows of one epoch, numbered from 0. `read` is called from a background thread."""

    @property
    def seq_len(self) -> int:
        """Return T: a sample has up to T inputs and T labels."""

    @property
    def num_samples(self) -> int:
        """Return the number of samples of one epoch."""

    def read(self, window: int, vocab_size: int | None) -> Sample:
        """Return what a window holds. Raises `DataError` if the data is damaged or an id is outside the vocabulary."""

    def pause(self) -> None:
        """Close the files until the next read."""


class Windows:
    """Windows of T+1 tokens, T apart: a window's last token is the first of the next, so each is a label once.

    Window w starts at token w * T. The last, partial window of the tokens is no sample of an epoch, but can be read:
    `num_readable` counts it.
    """

    def __init__(self, dataset: Dataset, seq_len: int) -> None:
        self.dataset, self.seq_len = dataset, seq_len
        self.num_samples = num_windows(dataset.num_tokens, seq_len)
        self.num_readable = -(-(dataset.num_tokens - 1) // seq_len) if dataset.num_tokens else 0

    def read(self, window: int, vocab_size: int | None) -> Sample:
        """Return a window, shorter than T+1 tokens at the end of the split."""
        start = window * self.seq_len
        count = min(self.seq_len + 1, self.dataset.num_tokens - start)
        return Sample(read_ids(self.dataset, start, count, vocab_size), counts=self.dataset.counts(start, count))

    def pause(self) -> None:
        """Close the files until the next read."""
        self.dataset.pause()


class PackedSamples:
    """Windows of whole documents, as a packing index says; of documents longer than T+1 tokens, of pieces of them.

    A preference pair is one document, both sides of which are pieces of its window.
    """

    def __init__(self, dataset: IndexedDataset, index: PackingIndex) -> None:
        self.dataset, self.index = dataset, index
        self.seq_len, self.num_samples = index.card.seq_len, index.card.samples
        self.num_readable = self.num_samples

    def read(self, window: int, vocab_size: int | None) -> Sample:
        """Return the documents of a window."""
        pieces = self.index.pieces(window)
        starts, lengths, flags = (pieces[name].tolist() for name in ("start", "length", "flags"))
        places = list(zip(starts, lengths, strict=True))
        ids = [read_ids(self.dataset, *place, vocab_size) for place in places]
        if self.dataset.card.has_pairs:
            return self._pairs(places, ids)
        counts = [found for place in places if (found := self.dataset.counts(*place)) is not None]
        ends = np.cumsum(lengths).tolist()
        unrelated = [
            end - 1
            for end, before, after in zip(ends, flags, flags[1:], strict=False)
            if not (before & ENDS and after & BEGINS)
        ]
        return Sample(np.concatenate(ids), lengths, tuple(unrelated), np.concatenate(counts) if counts else None)

    def _pairs(self, places: list[tuple[int, int]], ids: list[np.ndarray]) -> Sample:
        """Return the pairs of a window. Raises `DataError` if one has no two sides."""
        lengths, counts = [], []
        for start, length in places:
            marks = self.dataset.marks(start, length)
            assert marks is not None
            num_chosen = int(np.argmax(marks & REJECTED))
            if not num_chosen:
                raise DataError(f"{self.dataset.name}: the pair at token {start} has no two sides; prepare it again")
            lengths += [num_chosen, length - num_chosen]
            counts.append((marks & COUNTS) > 0)
        numbers = self.dataset.first_document + np.searchsorted(self._starts, [start for start, _ in places])
        return Sample(np.concatenate(ids), lengths, counts=np.concatenate(counts), pairs=numbers.astype(np.int64))

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first token of each document of the split, int64."""
        lengths = np.concatenate([np.zeros(1, np.int64), *self.dataset.lengths()])
        return np.cumsum(lengths)[:-1]

    def pause(self) -> None:
        """Close the files until the next read."""
        self.dataset.pause()
        self.index.pause()


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Return how many whole windows of `seq_len + 1` tokens, `seq_len` apart, a split has."""
    return max(0, num_tokens - 1) // seq_len


def num_samples(folder: Path, card: Card, packing: str, seq_len: int, verify: bool) -> int:
    """Return how many samples one epoch of a dataset's train split has; no tokens are read.

    With `best_fit` its packing is computed, unless that was done before.
    """
    if "train" not in card.splits:
        return 0
    if packing == BEST_FIT and card.splits["train"].tokens:
        return open_packing(IndexedDataset.of_card(folder, "train", card, verify), seq_len, verify).card.samples
    return num_windows(card.splits["train"].tokens, seq_len)


def open_samples(dataset: IndexedDataset, packing: str, seq_len: int, verify: bool) -> Windows | PackedSamples:
    """Open the samples of a split. Raises `DataError` if it has too few tokens for one."""
    if packing == BEST_FIT:
        return PackedSamples(dataset, open_packing(dataset, seq_len, verify))
    if dataset.num_tokens <= seq_len:
        raise DataError(
            f"{dataset.name} holds {dataset.num_tokens} tokens, one sample of train.seq_len={seq_len} needs "
            f"{seq_len + 1}; use a smaller train.seq_len or more data"
        )
    return Windows(dataset, seq_len)


def open_heldout(dataset: Dataset, seq_len: int) -> Windows | PackedSamples:
    """Open what an evaluation reads: windows, or whole conversations where only some of their tokens count."""
    if isinstance(dataset, IndexedDataset) and dataset.split_card.loss_hashes:
        return PackedSamples(dataset, open_packing(dataset, seq_len, dataset.verifies))
    return Windows(dataset, seq_len)


def read_ids(dataset: Dataset, start: int, count: int, vocab_size: int | None) -> np.ndarray:
    """Return `count` ids (int64) from token `start` on. Raises `DataError` if one is outside the vocabulary."""
    ids = dataset.read(start, count)
    if vocab_size is not None and len(ids) and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        at = int(np.argmax((ids >= vocab_size) | (ids < 0)))
        raise DataError(
            f"{dataset.name}: token id {int(ids[at])} at {dataset.place(start + at)} is outside the vocabulary "
            f"(0 to {vocab_size - 1}); model.vocab_size must be that of the tokenizer which made the data"
        )
    return ids

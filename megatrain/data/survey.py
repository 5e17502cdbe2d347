"""Figures of a prepared dataset from its files: document lengths, token frequencies, random documents.

Memory does not grow with the dataset. Nothing is verified here (`verify_dataset` does that). Imports no torch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatrain.data.card import Card
from megatrain.data.indexed import COUNTS, HEADER, loss_file, pair, read_header
from megatrain.errors import DataError

_STRIDE = 2**20
"""Document lengths or tokens read at once."""
_EXACT = 2**16
"""Lengths below this are counted one by one, longer ones in buckets."""
_BUCKETS = 64
"""Buckets per doubling of the length: a quantile of long documents is at most 1.1% too small."""
_MAX_PIECES = 64
"""Most pieces of `_STRIDE` tokens of which frequencies are counted; a larger dataset is sampled."""
_MAX_VOCABULARY = 2**20
"""Ids counted if the vocabulary is unknown."""


class Lengths:
    """How many documents have which number of tokens, the end token included."""

    def __init__(self) -> None:
        self.documents = self.tokens = 0
        self.shortest = self.longest = 0
        self._counts = np.zeros(_EXACT + 16 * _BUCKETS, np.int64)
        self._tokens = np.zeros(len(self._counts))  # exact up to 2**53

    def add(self, lengths: np.ndarray) -> None:
        """Count documents, given their lengths."""
        if not len(lengths):
            return
        low, high = int(lengths.min()), int(lengths.max())
        self.shortest = low if not self.documents else min(low, self.shortest)
        self.longest = max(high, self.longest)
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))
        bucket = lengths.astype(np.int64)
        long = bucket >= _EXACT
        bucket[long] = _EXACT + (_BUCKETS * np.log2(bucket[long] / _EXACT)).astype(np.int64)
        self._counts += np.bincount(bucket, minlength=len(self._counts))
        self._tokens += np.bincount(bucket, weights=lengths, minlength=len(self._counts))

    def quantile(self, share: float) -> int:
        """Return the smallest length that at least this share of the documents does not exceed."""
        wanted = max(1, int(np.ceil(share * self.documents)))
        at = int(np.searchsorted(np.cumsum(self._counts), wanted))
        return min(max(self._length(at), self.shortest), self.longest)

    def bins(self) -> list[tuple[int, int, int]]:
        """Return documents and their tokens per doubling of the length: `(first length, documents, tokens)`.

        The bin at 4 has lengths 4 to 7. One for documents of no tokens starts at 0. Bins before the first document and
        after the last are left out.
        """
        found: dict[int, tuple[int, int]] = {}
        for at in np.flatnonzero(self._counts).tolist():
            exponent = at.bit_length() - 1 if at < _EXACT else 16 + (at - _EXACT) // _BUCKETS
            documents, tokens = found.get(exponent, (0, 0))
            found[exponent] = documents + int(self._counts[at]), tokens + int(self._tokens[at])
        if not found:
            return []
        exponents = range(min(found), max(found) + 1)
        return [(int(2**e) if e >= 0 else 0, *found.get(e, (0, 0))) for e in exponents]

    @staticmethod
    def _length(bucket: int) -> int:
        return bucket if bucket < _EXACT else int(_EXACT * 2 ** ((bucket - _EXACT) / _BUCKETS))


def count_lengths(folder: Path, card: Card) -> Lengths:
    """Count the documents of all splits by length. Raises `DataError` if an `.idx` is damaged."""
    lengths = Lengths()
    for name, _ in card.pairs():
        idx_path = pair(folder / name)[1]
        num_sequences = read_header(folder / name).num_sequences
        with open(idx_path, "rb") as file:
            file.seek(HEADER.size)
            for first in range(0, num_sequences, _STRIDE):
                read = np.fromfile(file, dtype="<i4", count=min(_STRIDE, num_sequences - first))
                if len(read) and read.min() < 0:
                    raise DataError(f"{idx_path}: damaged: a document has {read.min()} tokens; prepare it again")
                lengths.add(read)
    return lengths


@dataclass
class TokenCounts:
    """How often each id occurs (`counts[id]`) among `counted` of `tokens` tokens; `beyond` ids are too large."""

    counts: np.ndarray
    counted: int
    tokens: int
    beyond: int


def count_tokens(folder: Path, card: Card) -> TokenCounts:
    """Count the ids of all splits: of every token, or in a large dataset of evenly spaced pieces.

    Raises `DataError` if a `.bin` is shorter than its card says.
    """
    size = card.tokenizer.vocab_size if card.tokenizer else _MAX_VOCABULARY
    pieces = [
        (name, start, min(_STRIDE, split.tokens - start), split.dtype)
        for name, split in card.pairs()
        for start in range(0, split.tokens, _STRIDE)
    ]
    tokens = sum(count for _, _, count, _ in pieces)
    if len(pieces) > _MAX_PIECES:
        pieces = [pieces[at * len(pieces) // _MAX_PIECES] for at in range(_MAX_PIECES)]
    found = TokenCounts(np.zeros(size, np.int64), 0, tokens, 0)
    for name, start, count, dtype in pieces:
        ids = _read_ids(folder / name, np.dtype(dtype), start, count)
        known = ids[(ids >= 0) & (ids < size)]
        found.counts += np.bincount(known, minlength=size)
        found.counted += count
        found.beyond += count - len(known)
    return found


@dataclass
class Sample:
    """A document: its split, its number there, its length in tokens, and its first ids.

    `counts` says which of the ids count in the loss; None: all of them.
    """

    split: str
    number: int
    length: int
    ids: list[int]
    counts: list[bool] | None = None


def sample_documents(folder: Path, card: Card, count: int, seed: int, max_tokens: int) -> Iterator[Sample]:
    """Yield `count` random documents, fewer if there are not so many, with at most `max_tokens` ids each.

    They depend on the dataset and the seed alone. Raises `DataError` if a file is damaged.
    """
    pairs = [(split, *named) for split, splits in card.splits.items() for named in splits.pairs(split)]
    sizes = [read_header(folder / name).num_sequences for _, name, _ in pairs]
    total = sum(sizes)
    for chosen in sorted(random.Random(seed).sample(range(total), min(count, total))):
        at = chosen
        number = dict.fromkeys(card.splits, 0)  # documents of earlier pairs of the same split
        for (split, name, part), size in zip(pairs, sizes, strict=True):
            if at < size:
                length, start = _locate(folder / name, at, size, part.dtype)
                ids = _read_ids(folder / name, np.dtype(part.dtype), start, min(length, max_tokens))
                counts = _read_counts(folder / name, start, len(ids)).tolist() if part.loss_hashes else None
                yield Sample(split, number[split] + at, length, ids.tolist(), counts)
                break
            number[split] += size
            at -= size


def count_in_loss(folder: Path, card: Card) -> dict[str, int]:
    """Return how many tokens of each split count in the loss; of splits where that is not all of them.

    Raises `DataError` if a `.loss` is shorter than its card says.
    """
    return {
        name: sum(
            int(np.count_nonzero(_read_counts(folder / name, start, min(_STRIDE, split.tokens - start))))
            for start in range(0, split.tokens, _STRIDE)
        )
        for name, split in card.splits.items()
        if split.loss_hashes
    }


def _locate(prefix: Path, at: int, num_sequences: int, dtype: str) -> tuple[int, int]:
    """Return the length and the first token of a document."""
    idx_path = pair(prefix)[1]
    length = np.fromfile(idx_path, dtype="<i4", count=1, offset=HEADER.size + 4 * at)
    offset = np.fromfile(idx_path, dtype="<i8", count=1, offset=HEADER.size + 4 * num_sequences + 8 * at)
    if not len(length) or not len(offset) or length[0] < 0 or offset[0] < 0:
        raise DataError(f"{idx_path}: damaged at document {at}; copy or prepare the dataset again")
    return int(length[0]), int(offset[0]) // np.dtype(dtype).itemsize


def _read_ids(prefix: Path, dtype: np.dtype, start: int, count: int) -> np.ndarray:
    """Return the ids `[start, start + count)` of a `.bin` as int64."""
    bin_path = pair(prefix)[0]
    ids = np.fromfile(bin_path, dtype=dtype, count=count, offset=start * dtype.itemsize)
    if len(ids) < count:
        raise DataError(
            f"{bin_path}: ends at token {start + len(ids)}, but the card says more; copy or prepare the dataset again"
        )
    return ids.astype(np.int64)


def _read_counts(prefix: Path, start: int, count: int) -> np.ndarray:
    """Return which of the tokens `[start, start + count)` count in the loss (bool), from a `.loss`."""
    path = loss_file(prefix)
    try:
        counts = np.fromfile(path, dtype=np.uint8, count=count, offset=start)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy or prepare the dataset again") from error
    if len(counts) < count:
        raise DataError(
            f"{path}: ends at token {start + len(counts)}, but the card says more; copy or prepare the dataset again"
        )
    return (counts & COUNTS) > 0

"""Read and verify prepared datasets: their tokens, and the lengths of their documents.

Not here: the order of samples (order.py), batches (loader.py), writing (preparation.py). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatrain.data.card import Card, SplitCard, check_dataset, fingerprint
from megatrain.data.indexed import BLOCK_BYTES, COUNTS, HEADER, hash_blocks, hash_file, loss_file, pair, read_header
from megatrain.data.verified_file import VerifiedFile
from megatrain.errors import DataError

_MAX_OPEN = 64
"""Pairs of one split that are open at once; a process may often open no more than 1,024 files."""

_STRIDE = 2**18  # document lengths read at once
_REMEDY = "copy or prepare the dataset again"


class IndexedDataset:
    """One split of a prepared dataset: a `Dataset` over `.bin` and `.idx` files. Open it with `IndexedDataset.open`.

    What is read of the `.bin` was verified first (verified_file.py).
    """

    def __init__(self, folder: Path, split: str, card: Card, verify: bool) -> None:
        self.folder = folder
        self.split = split
        self.card = card
        self.split_card: SplitCard = card.splits[split]
        self.fingerprint: str = card.fingerprint
        self.num_tokens: int = self.split_card.tokens
        self.first_document = _first_document(split, card)
        self.bin_path, self.idx_path = pair(folder / split)
        self._dtype = np.dtype(self.split_card.dtype)
        self.verifies = verify
        card_of_bin = self.split_card.bin_size, self.split_card.block_hashes
        self._file = VerifiedFile(self.bin_path, *card_of_bin, verify, _REMEDY)
        self._loss: VerifiedFile | None = None
        if hashes := self.split_card.loss_hashes:
            self._loss = VerifiedFile(loss_file(folder / split), self.num_tokens, hashes, verify, _REMEDY)

    @staticmethod
    def open(folder: Path, split: str, verify: bool = True) -> IndexedDataset:
        """Open a split of the dataset in `folder`.

        With `verify`, each 64 MiB block is hashed when it is first read, and again if the file changes.

        Raises `ConfigError` if there is no dataset, `DataError` if it is damaged or has no such split.
        """
        return IndexedDataset.of_card(Path(folder), split, check_dataset(Path(folder)), verify)

    @staticmethod
    def of_card(folder: Path, split: str, card: Card, verify: bool = True) -> IndexedDataset:
        """Open a split of a dataset whose card `check_dataset` returned. Raises `DataError` if it has no such split."""
        if split not in card.splits:
            raise DataError(f"{folder}: has no {split} split; prepare it with data.heldout_fraction above 0")
        if not card.splits[split].tokens:
            raise DataError(f"{folder}: its {split} split is empty; prepare it from data that contains tokens")
        return (ChainedDataset if card.splits[split].parts else IndexedDataset)(folder, split, card, verify)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return token ids `[start, start + count)` as a new int64 array.

        Raises `DataError` if the file differs from what was prepared, `EnvironmentFault` if the system cannot read it.
        """
        assert start >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        itemsize = self._dtype.itemsize
        data = self._file.read(start * itemsize, (start + count) * itemsize)
        return np.frombuffer(data, self._dtype).astype(np.int64)

    def counts(self, start: int, count: int) -> np.ndarray | None:
        """Return which tokens of `[start, start + count)` count in the loss as labels (bool); None: all of them.

        Raises as `read`.
        """
        marks = self.marks(start, count)
        return None if marks is None else (marks & COUNTS) > 0

    def marks(self, start: int, count: int) -> np.ndarray | None:
        """Return the bytes (uint8) of `[start, start + count)` in the `.loss`; None without one. Raises as `read`."""
        return None if self._loss is None else np.frombuffer(self._loss.read(start, start + count), np.uint8)

    def lengths(self) -> Iterator[np.ndarray]:
        """Yield the lengths of the documents in tokens (int32), in order, a few hundred thousand at once.

        Raises `DataError` if the `.idx` is cut short, or its lengths do not fit the tokens.
        """
        total = 0
        num_sequences = read_header(self.folder / self.split).num_sequences
        with open(self.idx_path, "rb") as index:
            index.seek(HEADER.size)
            for first in range(0, num_sequences, _STRIDE):
                count = min(_STRIDE, num_sequences - first)
                lengths = np.fromfile(index, dtype="<i4", count=count)
                if len(lengths) < count:
                    raise DataError(f"{self.idx_path}: cut short at byte {HEADER.size + 4 * (first + len(lengths))}")
                ends = total + np.cumsum(lengths, dtype=np.int64)
                wrong = (lengths < 0) | (ends > self.num_tokens)
                if wrong.any():
                    at = int(np.argmax(wrong))
                    raise DataError(
                        f"{self.idx_path}: damaged: a document of {lengths[at]} tokens starts at token "
                        f"{ends[at] - lengths[at]} of {self.num_tokens}"
                    )
                total = int(ends[-1])
                yield lengths

    def documents(self) -> Iterator[np.ndarray]:
        """Yield the token ids (int64) of each document, its end-of-document token included."""
        start = 0
        for lengths in self.lengths():
            for length in lengths.tolist():
                yield self.read(start, length)
                start += length

    @property
    def name(self) -> str:
        """Return the path of the `.bin`."""
        return str(self.bin_path)

    def place(self, token: int) -> str:
        """Return the token's offset in the `.bin`."""
        return f"byte {token * self._dtype.itemsize}"

    def pause(self) -> None:
        """Close the files until the next read."""
        self._file.pause()
        if self._loss is not None:
            self._loss.pause()


def _first_document(split: str, card: Card) -> int:
    """Return how many documents the splits have that are numbered before this one: the train split comes first."""
    return card.splits["train"].documents if split != "train" and "train" in card.splits else 0


class ChainedDataset(IndexedDataset):
    """A split of several pairs, read one after another as one long sequence; at most `_MAX_OPEN` of them are open."""

    def __init__(self, folder: Path, split: str, card: Card, verify: bool) -> None:
        self.folder, self.split, self.card = folder, split, card
        self.split_card = card.splits[split]
        self.fingerprint = card.fingerprint
        self.num_tokens = self.split_card.tokens
        self.first_document = _first_document(split, card)
        self._pairs = self.split_card.pairs(split)
        self._ends = np.cumsum([part.tokens for _, part in self._pairs])
        self.verifies = verify
        self._parts: dict[int, IndexedDataset] = {}
        self._in_use: list[int] = []  # those that are open, the latest last

    def read(self, start: int, count: int) -> np.ndarray:
        """Return token ids `[start, start + count)` as a new int64 array, across the ends of pairs."""
        assert start >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        pieces = [np.empty(0, np.int64)]
        while count:
            at, offset = self._locate(start)
            taken = min(count, int(self._ends[at]) - start)
            pieces.append(self._part(at).read(offset, taken))
            start, count = start + taken, count - taken
        return np.concatenate(pieces)

    def marks(self, start: int, count: int) -> np.ndarray | None:
        """Return None: all tokens of such a split count."""
        return None

    def lengths(self) -> Iterator[np.ndarray]:
        """Yield the lengths of the documents of each pair."""
        for at in range(len(self._pairs)):
            yield from self._part(at).lengths()

    @property
    def name(self) -> str:
        """Return the dataset's folder and the split."""
        return f"{self.folder} ({self.split})"

    def place(self, token: int) -> str:
        """Return the token's offset in its `.bin`."""
        at, offset = self._locate(token)
        return f"{self._part(at).place(offset)} of {self._part(at).name}"

    def pause(self) -> None:
        """Close all pairs until they are read again."""
        while self._in_use:
            self._parts[self._in_use.pop()].pause()

    def _locate(self, token: int) -> tuple[int, int]:
        """Return the pair that holds a token, and the token's index in it."""
        at = int(np.searchsorted(self._ends, token, side="right"))
        return at, token - int(self._ends[at]) + self._pairs[at][1].tokens

    def _part(self, at: int) -> IndexedDataset:
        """Return a pair, and close the one that was used longest ago if too many are open."""
        if at not in self._in_use:
            if at not in self._parts:
                name, part = self._pairs[at]
                alone = Card(self.card.name, self.fingerprint, {name: part}, None)
                self._parts[at] = IndexedDataset(self.folder, name, alone, self.verifies)
            if len(self._in_use) >= _MAX_OPEN:
                self._parts[self._in_use.pop(0)].pause()
        else:
            self._in_use.remove(at)
        self._in_use.append(at)
        return self._parts[at]


def verify_dataset(folder: Path) -> None:
    """Verify every checksum of a prepared dataset, and its tokenizer.

    Raises `ConfigError` or `DataError` for the first mismatch with the card.
    """
    from megatrain.data.tokenizer_loading import load_tokenizer

    card = check_dataset(folder)
    for name, split in card.pairs():
        bin_path, idx_path = pair(folder / name)
        if hash_file(idx_path) != split.idx_hash:
            raise DataError(f"{idx_path}: its hash does not match the card's: the file was changed")
        hashed = {bin_path: split.block_hashes}
        if split.loss_hashes:
            hashed[loss_file(folder / name)] = split.loss_hashes
        for path, hashes in hashed.items():
            for block, (found, expected) in enumerate(zip(hash_blocks(path), hashes, strict=True)):
                if found != expected:
                    raise DataError(f"{path}: block at byte {block * BLOCK_BYTES} does not match the card's hash")
    assert card.fingerprint == fingerprint(card.splits)
    if card.tokenizer is not None:
        tokenizer = load_tokenizer(folder / "tokenizer")
        for name in ("fingerprint", "vocab_size", "end_of_document"):
            found, expected = getattr(tokenizer, name), getattr(card.tokenizer, name)
            if found != expected:
                raise DataError(
                    f"{folder / 'tokenizer'}: not the tokenizer that made this dataset: its {name} is {found}, "
                    f"the card's {expected}"
                )

"""A prepared dataset as the loader sees it: one long run of token ids per split, each block verified when first read.

What is not here: the order of samples (order.py), batches (loader.py), writing (prepare.py). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatrain.data.card import Card, SplitCard, check_dataset, fingerprint
from megatrain.data.indexed import BLOCK_BYTES, HEADER, hash_blocks, hash_file, pair, read_header
from megatrain.errors import DataError

__all__ = ["Card", "Dataset", "check_dataset", "describe_dataset"]


class Dataset:
    """One split of a prepared dataset. Open it with `Dataset.open`."""

    def __init__(self, folder: Path, split: str, card: Card, verify: bool) -> None:
        self.folder = folder
        self.split = split
        self.card = card
        self.split_card: SplitCard = card.splits[split]
        self.fingerprint: str = card.fingerprint
        self.num_tokens: int = self.split_card.tokens
        self.bin_path, self.idx_path = pair(folder / split)
        self._tokens = np.memmap(self.bin_path, dtype=self.split_card.dtype, mode="r", shape=(self.num_tokens,))
        self._unverified: set[int] = set(range(len(self.split_card.block_hashes))) if verify else set()

    @staticmethod
    def open(folder: Path, split: str, verify: bool = True) -> Dataset:
        """Open a split of the dataset in `folder`; with `verify`, each 64 MiB block is hashed when it is first read.

        Raises `ConfigError` when there is no dataset, `DataError` when it is damaged or has no such split.
        """
        folder = Path(folder)
        card = check_dataset(folder)
        if split not in card.splits:
            raise DataError(f"{folder}: has no {split} split; prepare it with data.heldout_fraction above 0")
        if not card.splits[split].tokens:
            raise DataError(f"{folder}: its {split} split is empty; prepare it from data that holds tokens")
        return Dataset(folder, split, card, verify)

    def read(self, start: int, count: int) -> np.ndarray:
        """Token ids `[start, start + count)` as a new int64 array. Raises `DataError` if a block is not what it was."""
        assert start >= 0 and start + count <= self.num_tokens, (start, count, self.num_tokens)
        if self._unverified and count:
            itemsize = self._tokens.itemsize
            first, last = start * itemsize // BLOCK_BYTES, ((start + count) * itemsize - 1) // BLOCK_BYTES
            for block in range(first, last + 1):
                if block in self._unverified:
                    self._verify(block)
        return self._tokens[start : start + count].astype(np.int64)

    def documents(self) -> Iterator[np.ndarray]:
        """The token ids (int64) of each document in turn, its end-of-document token included."""
        header = read_header(self.folder / self.split)
        lengths = np.memmap(self.idx_path, dtype="<i4", mode="r", offset=HEADER.size, shape=(header.num_sequences,))
        start = 0
        for length in lengths:
            yield self.read(start, int(length))
            start += int(length)

    def offset(self, token: int) -> int:
        """Byte offset of a token in the `.bin`."""
        return token * self._tokens.itemsize

    def _verify(self, block: int) -> None:
        start = block * BLOCK_BYTES
        data = np.memmap(self.bin_path, dtype=np.uint8, mode="r")[start : start + BLOCK_BYTES]
        if xxhash.xxh3_64_hexdigest(data.data) != self.split_card.block_hashes[block]:
            raise DataError(
                f"{self.bin_path}: bytes {start} to {start + len(data)} are not what was prepared (hash differs from the card's); "
                "copy or prepare the dataset again"
            )
        self._unverified.discard(block)


def describe_dataset(folder: Path) -> dict[str, Any]:
    """What a prepared dataset holds, every checksum verified: the answer of `megatrain inspect`.

    Raises `ConfigError` or `DataError` at the first thing that is not as the card says.
    """
    from megatrain.data.tokenizer import load_tokenizer

    card = check_dataset(folder)
    for name, split in card.splits.items():
        bin_path, idx_path = pair(folder / name)
        if hash_file(idx_path) != split.idx_hash:
            raise DataError(f"{idx_path}: its hash is not the card's: the file was changed")
        for block, (found, expected) in enumerate(zip(hash_blocks(bin_path), split.block_hashes, strict=True)):
            if found != expected:
                raise DataError(f"{bin_path}: block at byte {block * BLOCK_BYTES} does not match the card's hash")
    assert card.fingerprint == fingerprint(card.splits)
    if card.tokenizer is not None:
        tokenizer = load_tokenizer(folder / "tokenizer")
        for name in ("fingerprint", "vocab_size", "end_of_document"):
            found, expected = getattr(tokenizer, name), getattr(card.tokenizer, name)
            if found != expected:
                raise DataError(
                    f"{folder / 'tokenizer'}: not the tokenizer that made this dataset: its {name} is {found}, the card's "
                    f"{expected}"
                )
    return {
        "kind": "dataset",
        "name": card.name,
        "fingerprint": card.fingerprint,
        "splits": {
            name: {"documents": split.documents, "bytes": split.bytes, "tokens": split.tokens, "dtype": split.dtype}
            for name, split in card.splits.items()
        },
        "tokenizer": vars(card.tokenizer) if card.tokenizer else None,
        "source": card.source,
        "counts": card.counts,
        "verified": "all checksums match",
    }

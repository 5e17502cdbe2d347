"""The stored packing of a dataset: which pieces of documents each sample has, computed once and kept beside the data.

`<dataset>/packing/<split>_<T>.bin` has the pieces of all samples, one sample after another (`packing.PIECE`), then 0
and where each sample ends among them (int64). `<split>_<T>.json` is its card, written last. Imports no torch.
"""

from __future__ import annotations

import errno
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatrain.data.indexed import BlockHasher, hash_blocks, hash_file, pair
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.packing import BEGINS, ENDS, PIECE, best_fit, cut
from megatrain.data.verified_file import VerifiedFile
from megatrain.errors import ConfigError, DataError, cannot_write
from megatrain.resilience.atomic_file import remove_abandoned, replacing, write_atomically

FOLDER = "packing"
FORMAT = 1
_AT_ONCE = 2**22
"""Pieces packed together. This bounds the memory, to about half a GB; each block's last samples may be less full."""
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOG = logging.getLogger("megatrain")


@dataclass(frozen=True)
class PackingCard:
    """What a packing is of, its figures, and its file's size and hashes.

    Of `documents` (empty ones not counted), `cut` are longer than T+1 tokens and cut into pieces, or left out if they
    are preference pairs;
    `cut_by_windows` would be cut by `data.packing=concatenate`. Of the `samples` x (T+1) places, `tokens` are filled.
    """

    fingerprint: str
    split: str
    seq_len: int
    documents: int
    cut: int
    cut_by_windows: int
    pieces: int
    samples: int
    tokens: int
    size: int
    block_hashes: list[str]
    format: int = FORMAT

    @property
    def figures(self) -> dict[str, int | float]:
        """The figures for records: counts, and the shares of documents cut and of places that are padding."""
        return {
            "seq_len": self.seq_len,
            "documents": self.documents,
            "samples": self.samples,
            "cut_share": round(self.cut / self.documents, 6),
            "cut_share_of_windows": round(self.cut_by_windows / self.documents, 6),
            "padding_share": round(1 - self.tokens / (self.samples * (self.seq_len + 1)), 6),
        }


class PackingIndex:
    """An opened packing."""

    def __init__(self, path: Path, card: PackingCard, verify: bool) -> None:
        self.card = card
        self._file = VerifiedFile(path, card.size, card.block_hashes, verify, _remedy(path))

    def pieces(self, sample: int) -> np.ndarray:
        """Return the pieces of a sample, as `PIECE`s in order. Raises `DataError` if the file is damaged."""
        assert 0 <= sample < self.card.samples, (sample, self.card.samples)
        at = self.card.pieces * PIECE.itemsize + 8 * sample
        start, stop = (PIECE.itemsize * int(number) for number in np.frombuffer(self._file.read(at, at + 16), "<i8"))
        return np.frombuffer(self._file.read(start, stop), PIECE)

    def pause(self) -> None:
        """Close the file until the next read."""
        self._file.pause()


def open_packing(dataset: IndexedDataset, seq_len: int, verify: bool) -> PackingIndex:
    """Open the packing of a split into samples of `seq_len + 1` tokens; compute it first if that was not done before.

    Where the dataset's folder cannot be written to, each process computes it once, and a warning says so.

    Raises:
        DataError: the dataset's `.idx` is damaged.
        ConfigError, EnvironmentFault: the packing cannot be written.
    """
    path = _path(dataset.folder, dataset.split, seq_len)
    if card := _stored(path, dataset, seq_len):
        return PackingIndex(path, card, verify)
    try:
        path.parent.mkdir(exist_ok=True)
        remove_abandoned(path.parent)
        return PackingIndex(path, _make(path, dataset, seq_len), verify)
    except FileExistsError as error:
        raise ConfigError(
            f"data.packing=best_fit: {path.parent} is no folder, so packings cannot be kept there; remove it"
        ) from error
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise cannot_write(path, error, "data.packing=best_fit") from error
        reason = error.strerror
    path = Path(_own_folder().name) / f"{dataset.fingerprint}_{path.name}"
    card = _stored(path, dataset, seq_len)
    if card is None:
        _LOG.warning(
            "data.packing=best_fit: nothing can be written to %s (%s), so each start packs anew",
            *(dataset.folder, reason),
        )
        card = _make(path, dataset, seq_len)
    return PackingIndex(path, card, verify)


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder that lives as long as this process."""
    return tempfile.TemporaryDirectory(prefix="megatrain_packing_")


def stored_packings(folder: Path) -> Iterator[PackingCard]:
    """Yield the cards of the packings that are kept with a dataset, by split and length."""
    found = [card for path in (folder / FOLDER).glob("*.json") if (card := _read_card(path))]
    yield from sorted(found, key=lambda card: (card.split, card.seq_len))


def verify_packings(folder: Path) -> None:
    """Verify the checksums of the packings that are kept with a dataset. Raises `DataError` for the first mismatch."""
    for card in stored_packings(folder):
        path = _path(folder, card.split, card.seq_len)
        if not path.is_file() or hash_blocks(path) != card.block_hashes:
            raise DataError(f"{path}: does not match its card's hashes; {_remedy(path)}")


def _path(folder: Path, split: str, seq_len: int) -> Path:
    return folder / FOLDER / f"{split}_{seq_len}.bin"


def _remedy(path: Path) -> str:
    return f"remove the folder {path.parent}: it is then made again"


def _stored(path: Path, dataset: IndexedDataset, seq_len: int) -> PackingCard | None:
    """Return the card of a packing if it is there, whole, and of this dataset."""
    card = _read_card(path.with_suffix(".json"))
    if card is None or (card.fingerprint, card.split, card.seq_len) != (dataset.fingerprint, dataset.split, seq_len):
        return None
    with suppress(OSError):
        return card if path.stat().st_size == card.size else None
    return None


def _read_card(path: Path) -> PackingCard | None:
    """Return a card, None if there is none that is whole: a packing without one is made again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("checksum") != _checksum(content):
            return None
        card = PackingCard(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return card if card.format == FORMAT else None


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _make(path: Path, dataset: IndexedDataset, seq_len: int) -> PackingCard:
    """Pack a split, write the file and its card, and return the card."""
    began = time.monotonic()
    for name, part in dataset.split_card.pairs(dataset.split):
        if hash_file(idx := pair(dataset.folder / name)[1]) != part.idx_hash:
            raise DataError(f"{idx}: its hash does not match the card's: the file was changed")
    documents = num_cut = cut_by_windows = num_pieces = samples = tokens = 0
    hasher = BlockHasher()  # of what is written: once it has its name, another process may replace the file
    with replacing(path) as file, tempfile.TemporaryFile(dir=path.parent) as ends_file:

        def write(data: bytes) -> None:
            file.write(data)
            hasher.update(memoryview(data))

        ends_file.write(bytes(8))
        for pieces in _blocks(dataset, seq_len):
            begins = pieces[(pieces["flags"] & BEGINS) > 0]
            is_cut = begins["flags"] & ENDS == 0
            if dataset.card.has_pairs:
                pieces = pieces[pieces["flags"] == BEGINS | ENDS]  # half a pair says nothing
            order, ends = best_fit(pieces["length"], seq_len + 1)
            write(pieces[order].tobytes())
            ends_file.write((num_pieces + ends).astype("<i8").tobytes())
            window_ends = begins["start"] // seq_len * seq_len + seq_len + 1
            documents += len(begins)
            num_cut += int(np.count_nonzero(is_cut))
            cut_by_windows += int(np.count_nonzero(is_cut | (begins["start"] + begins["length"] > window_ends)))
            num_pieces, samples = num_pieces + len(pieces), samples + len(ends)
            tokens += int(pieces["length"].sum(dtype=np.int64))
        ends_file.seek(0)
        while data := ends_file.read(2**22):
            write(data)
    size = num_pieces * PIECE.itemsize + 8 * (samples + 1)
    card = PackingCard(
        *(dataset.fingerprint, dataset.split, seq_len, documents, num_cut, cut_by_windows),
        *(num_pieces, samples, tokens, size, hasher.digests()),
    )
    content = asdict(card)
    write_atomically(path.with_suffix(".json"), json.dumps(content | {"checksum": _checksum(content)}) + "\n")
    _LOG.info("packed %s in %.1f s: %s", dataset.name, time.monotonic() - began, card.figures)
    return card


def _blocks(dataset: IndexedDataset, seq_len: int) -> Iterator[np.ndarray]:
    """Yield the pieces of all documents, about `_AT_ONCE` at once."""
    held: list[np.ndarray] = []
    first = 0
    for lengths in dataset.lengths():
        for part in _parts(lengths, seq_len):
            held.append(cut(part, first, seq_len))
            first += int(part.sum(dtype=np.int64))
            if sum(map(len, held)) >= _AT_ONCE:
                yield np.concatenate(held)
                held = []
    if first != dataset.num_tokens:
        raise DataError(f"{dataset.name}: its documents have {first} tokens, the split has {dataset.num_tokens}")
    if held:
        yield np.concatenate(held)


def _parts(lengths: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Return documents in parts of about `_AT_ONCE` pieces: very long documents have many pieces each."""
    pieces = np.cumsum(1 + lengths // seq_len, dtype=np.int64)
    bounds = range(_AT_ONCE, int(pieces[-1]) if len(pieces) else 0, _AT_ONCE)
    return np.split(lengths, np.unique(np.searchsorted(pieces, bounds, side="right")))

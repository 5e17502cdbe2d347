"""The order of samples: which window of the dataset is sample k of a run. No files, no tokens, no torch.

Each epoch shuffles its windows with a keyed permutation of 0..n-1 that is computed, not stored: starting an epoch of
any size costs nothing, and any sample can be looked up on its own. Moving the cursor past skip ranges is here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import xxhash

_ROUNDS = 8


class Order(Protocol):
    """An order of samples: which window of the data is sample k of a run."""

    seq_len: int

    def windows(self, k: np.ndarray) -> np.ndarray:
        """Return the window (int64, same shape) of each sample number `k` (int64, from 0)."""


class SampleOrder:
    """Maps sample k of a run to its window: a pure function of (dataset fingerprint, split, sequence length, seed, k).

    An epoch has `samples_per_epoch` windows (`Samples.num_samples`). Raises `ValueError` if there is none.
    """

    def __init__(self, fingerprint: str, split: str, seq_len: int, samples_per_epoch: int, seed: int) -> None:
        self.seq_len = seq_len
        self.samples_per_epoch = samples_per_epoch
        if samples_per_epoch < 1:
            raise ValueError(f"the {split} split has no sample of {seq_len} + 1 tokens")
        self._key = f"{fingerprint}|{split}|{seq_len}|{seed}"

    def windows(self, k: np.ndarray) -> np.ndarray:
        """Return the window (int64, same shape) of each sample number `k` (int64, from 0)."""
        k = np.asarray(k, dtype=np.int64)
        epochs = k // self.samples_per_epoch
        windows = np.empty_like(k)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = permute(
                k[chosen] % self.samples_per_epoch, self.samples_per_epoch, f"{self._key}|{epoch}"
            )
        return windows


def permute(index: np.ndarray, n: int, key: str) -> np.ndarray:
    """Apply a keyed permutation of 0..n-1 to each element of `index` (int64), in O(1) memory per element.

    A generalised Feistel network over Z_a x Z_a with a = ceil(sqrt(n)), whose domain a * a is barely larger than n. A
    value of n or more is permuted again until it is below n: cycle walking (Black and Rogaway, "Ciphers with Arbitrary
    Finite Domains", 2002).
    """
    a = np.uint64(math.isqrt(n - 1) + 1)
    round_keys = [np.uint64(xxhash.xxh3_64_intdigest(key.encode(), seed=r)) for r in range(_ROUNDS)]
    value: np.ndarray = index.astype(np.uint64)
    outside = np.arange(len(value))
    while len(outside):
        left: np.ndarray = value[outside] // a
        right: np.ndarray = value[outside] % a
        for round_key in round_keys:
            left, right = right, (left + _mix(right ^ round_key) % a) % a
        value[outside] = left * a + right
        outside = outside[value[outside] >= np.uint64(n)]
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return x


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return sorted, disjoint `[start, stop)` ranges that cover the same positions; empty ranges are dropped."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(a), int(b)) for a, b in ranges):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def cursor_after(cursor: int, count: int, skip_ranges: Iterable[tuple[int, int]] = ()) -> int:
    """Return the cursor after the next `count` samples outside the skip ranges. As `take`, without their numbers."""
    end = cursor + count
    for start, stop in merge_ranges((max(start, cursor), stop) for start, stop in skip_ranges):
        if start < end:
            end += stop - start
    return end


def take(cursor: int, count: int, skip_ranges: Iterable[tuple[int, int]] = ()) -> tuple[np.ndarray, int]:
    """Return the next `count` sample numbers from `cursor` on, outside the skip ranges, and the new cursor.

    The numbers are int64 `[count]`; the new cursor is one past the last.
    """
    pieces: list[np.ndarray] = []
    for start, stop in merge_ranges(skip_ranges):
        if count and cursor < start:
            piece = np.arange(cursor, min(start, cursor + count), dtype=np.int64)
            pieces.append(piece)
            cursor, count = cursor + len(piece), count - len(piece)
        if count and start <= cursor < stop:
            cursor = stop
    pieces.append(np.arange(cursor, cursor + count, dtype=np.int64))
    return np.concatenate(pieces), cursor + count

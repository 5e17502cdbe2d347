"""The threshold that keeps an exact number of the largest values, over tensors that are read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_HALF = 16
"""Bits that each of two passes looks at: the order of positive floats is that of their bits, read as integers."""


def keep_threshold(tensors: Callable[[], Iterable[Tensor]], keep: int) -> float:
    """Return the smallest of the `keep` largest magnitudes among all values of float32 tensors; infinity for none.

    `tensors` is called twice. It holds one tensor and 65,536 counters at a time, whatever the number of values.
    """
    if keep <= 0:
        return float("inf")
    upper = _histogram(_bits(tensor) >> _HALF for tensor in tensors())
    bucket, above = _bucket(upper, keep)
    lower = _histogram((found := _bits(t))[found >> _HALF == bucket] & (2**_HALF - 1) for t in tensors())
    rest, _ = _bucket(lower, keep - above)
    return float(torch.tensor([(bucket << _HALF) | rest], dtype=torch.int32).view(torch.float32))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.float().abs().contiguous().view(torch.int32).flatten()


def _histogram(values: Iterable[Tensor]) -> Tensor:
    counts = torch.zeros(2**_HALF, dtype=torch.int64)
    for part in values:
        counts += torch.bincount(part, minlength=2**_HALF)
    return counts


def _bucket(counts: Tensor, keep: int) -> tuple[int, int]:
    """Return the bucket that holds the `keep`-th largest value, and the number of values in the buckets above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, keep))
    assert position < len(counts), "fewer values than are to be kept"
    return len(counts) - 1 - position, int(from_top[position - 1]) if position else 0

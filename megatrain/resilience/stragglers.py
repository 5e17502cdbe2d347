"""Find stragglers: ranks that are slower than comparable ones, so that the whole job waits for them. Imports no torch.

All ranks of a job finish a step together, because fast ranks wait for slow ones. What differs is a rank's own time: the
step's time minus the time it was held up by others (`distributed/waits.py`). A rank is compared with the others of its
kind: those in the same pipeline stage, as stages do different work. The only rank of its kind is not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

WINDOW = 36
"""Number of steps on which a verdict is based."""

QUICK = 0.1
"""The quantile of a rank's step times that represents its quick steps.

A slow rank is slow even in its quick steps, while noise comes and goes: in 1,000 steps of two ranks on two cores shared
with four other programs, window medians differed by a factor of up to 1.49, quick steps by 1.09.
"""

EVERY = 4
"""Steps between two verdicts. Judging every step would cost more and add little."""


@dataclass(frozen=True)
class Verdict:
    """A rank that has become slow, or has stopped being slow (`is_slow` is false).

    `own_s`, `others_s` and `ratio` are medians over the window: of the rank's own seconds per step, of the others', and
    of the ratio of the two.
    """

    rank: int
    is_slow: bool
    ratio: float
    own_s: float
    others_s: float


class Stragglers:
    """Keeps the own times of all ranks in the last steps. Reports a rank once when it becomes slow."""

    def __init__(self, kinds: Sequence[int], ratio: float) -> None:
        """`kinds` holds each rank's kind. A rank is slow if it takes over `ratio` times as long as its peers."""
        groups: dict[int, list[int]] = {}
        for rank, kind in enumerate(kinds):
            groups.setdefault(kind, []).append(rank)
        self._groups = [np.array(ranks) for ranks in groups.values() if len(ranks) > 1]
        self._slow_from = ratio
        self._quick_from = 1 + (ratio - 1) * 0.75
        self._over_below = 1 + (ratio - 1) * 0.5
        self._own = np.zeros((WINDOW, len(kinds)))
        self._others = np.ones((WINDOW, len(kinds)))
        self._known = 0
        self._slow: set[int] = set()

    def judge(self, seconds: Sequence[float]) -> list[Verdict]:
        """Add every rank's own seconds in one step, and return a verdict for each rank whose state changed."""
        row = self._known % WINDOW
        own = np.maximum(np.asarray(seconds, dtype=float), 1e-9)
        self._own[row] = own
        for ranks in self._groups:
            self._others[row, ranks] = _median_of_others(own[ranks])
        self._known += 1
        if self._known < WINDOW or self._known % EVERY or not self._groups:
            return []
        ratios = np.median(self._own / self._others, axis=0)
        quick = np.quantile(self._own, QUICK, axis=0) / np.quantile(self._others, QUICK, axis=0)
        found = []
        for rank in np.concatenate(self._groups):
            ratio = float(ratios[rank])
            if int(rank) not in self._slow and ratio > self._slow_from and quick[rank] > self._quick_from:
                self._slow.add(int(rank))
            elif int(rank) in self._slow and ratio < self._over_below:
                self._slow.discard(int(rank))
            else:
                continue
            medians = (float(np.median(table[:, rank])) for table in (self._own, self._others))
            found.append(Verdict(int(rank), int(rank) in self._slow, ratio, *medians))
        return found


def _median_of_others(values: FloatArray) -> FloatArray:
    """Return, for each value, the median of all others."""
    order = np.argsort(values, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(values))
    by_size = values[order]
    left = len(values) - 1  # number of other values

    def nth(index: int) -> FloatArray:
        """Return the `index`-th smallest of the other values, for each value."""
        chosen: FloatArray = np.where(place > index, by_size[index], by_size[min(index + 1, left)])
        return chosen

    middle: FloatArray = nth(left // 2) if left % 2 else (nth(left // 2 - 1) + nth(left // 2)) / 2
    return middle

"""Which ranks are slower than their like, so that the whole job waits for them. Judging alone; imports no torch.

Ranks of a job finish a step together, however unlike they are: the fast ones wait. What differs is a rank's own time, a
step's time without what it was held up by others (`waits.py`). A rank is compared with the others of its kind (those of the same pipeline
stage, for stages do different work); where a kind has only one rank, there is nobody to compare it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 36
"""Steps that a verdict looks at."""

QUICK = 0.1
"""The quantile of a rank's steps in the window that stands for its quick ones. A slow rank's are slow, too, while noise comes
and goes: in 1,000 steps of two ranks on two cores that four other programs used, the medians of a whole window were up to
1.49 times apart, and the quick steps 1.09 times (docs/measurements/faults.md)."""

EVERY = 4
"""Steps between two verdicts; judging each step anew would cost more and tell little."""


@dataclass(frozen=True)
class Verdict:
    """`rank` has become slow (or, where `is_slow` is false, is so no longer): medians over the window of its own seconds a
    step, of the others' and of the ratio of the two."""

    rank: int
    is_slow: bool
    ratio: float
    own_s: float
    others_s: float


class Stragglers:
    """Remembers the last steps' own times of all ranks, and names a rank once when it becomes slow."""

    def __init__(self, kinds: Sequence[int], ratio: float) -> None:
        """`kinds` by rank: only ranks of one kind are compared. A rank is slow from `ratio` times the others' time on."""
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
        """Take in every rank's own seconds of one step; what has changed."""
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


def _median_of_others(values: np.ndarray) -> np.ndarray:
    """For each value, the median of all others."""
    order = np.argsort(values, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(values))
    by_size = values[order]
    left = len(values) - 1  # that many are others

    def nth(index: int) -> np.ndarray:
        """The others' `index`-th smallest value."""
        return np.where(place > index, by_size[index], by_size[min(index + 1, left)])

    return nth(left // 2) if left % 2 else (nth(left // 2 - 1) + nth(left // 2)) / 2

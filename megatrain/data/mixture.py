"""Mixtures: which source sample k of a run comes from, and which sample of that source it is.

After n samples of a phase each source's count is within one sample of its share, for every n. Weights are whole numbers
that sum to a period, after which the assignment repeats: a table of one period and the counts before it answer any k.
No files, no tokens, no torch; `mixture_settings.py` reads the config.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from math import lcm

import numpy as np
import xxhash

from megatrain.data.order import SampleOrder, merge_ranges

LONGEST_PERIOD = 100_000
"""The largest sum of a phase's weights. Shares that need a larger one are rounded to it: five decimals."""


@dataclass(frozen=True)
class PlannedSource:
    """A source of a mixture: its dataset's fingerprint, and the number of samples in one epoch of it."""

    fingerprint: str
    samples: int


@dataclass(frozen=True)
class Phase:
    """What the samples from `start` on are mixed of: whole weights by source. A source of weight 0 is left out."""

    start: int
    weights: dict[str, int]


@dataclass(frozen=True)
class MixturePlan:
    """The sources, by name in ascending order, and the phases, the first of which starts at sample 0.

    All of it is whole numbers and names, so that equal plans give equal samples everywhere. Checkpoints hold it.
    """

    sources: dict[str, PlannedSource]
    phases: list[Phase]

    @property
    def fingerprint(self) -> str:
        """The mixture's identity: xxh3-128 over the sources' names and fingerprints, and the phases."""
        sources = {name: source.fingerprint for name, source in self.sources.items()}
        text = json.dumps([sources, [asdict(phase) for phase in self.phases]], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(text.encode())

    def locate(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source (its index in `sources`) of each sample number `k`, and the sample's number in it.

        All are int64 of one shape. A source counts its samples over all phases, so a phase goes on where another left
        off.
        """
        k = np.asarray(k, dtype=np.int64)
        source, own = np.empty_like(k), np.empty_like(k)
        for phase, before, stop in self._spans():
            chosen = (k >= phase.start) & (k < stop)
            if not chosen.any():
                continue
            names, table, earlier = self._period(phase)
            periods, place = np.divmod(k[chosen] - phase.start, len(table))
            local = table[place]
            weights = np.array([phase.weights[name] for name in names], dtype=np.int64)
            counts = np.array([before[name] for name in names], dtype=np.int64)
            source[chosen] = np.array([self._index[name] for name in names], dtype=np.int64)[local]
            own[chosen] = counts[local] + periods * weights[local] + earlier[place]
        return source, own

    def counts(self, n: int) -> dict[str, int]:
        """Return how many of the samples 0 to n - 1 each source gives."""
        for phase, before, stop in self._spans():
            if n <= stop:
                return self._add(before, phase, n - phase.start)
        raise AssertionError(n)

    def seen(self, cursor: int, skip_ranges: Iterable[tuple[int, int]] = ()) -> dict[str, int]:
        """Return how many samples before the cursor each source gave, without the skipped ones."""
        total = self.counts(cursor)
        for start, stop in merge_ranges((start, min(stop, cursor)) for start, stop in skip_ranges):
            first, last = self.counts(start), self.counts(stop)
            total = {name: total[name] - last[name] + first[name] for name in total}
        return total

    def first_weights(self, names: Collection[str]) -> dict[str, int]:
        """Return the weights of those of the named sources that the first phase with any of them has; empty if none."""
        of_names = ({name: w for name, w in phase.weights.items() if w and name in names} for phase in self.phases)
        return next(filter(None, of_names), {})

    def phase_at(self, k: int) -> Phase:
        """Return the phase that sample k belongs to."""
        return next(phase for phase in reversed(self.phases) if phase.start <= k)

    @property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.sources)}

    def _spans(self) -> Iterable[tuple[Phase, dict[str, int], int]]:
        """Yield each phase with the counts before it and the sample at which it ends."""
        before = dict.fromkeys(self.sources, 0)
        for phase, after in pairwise([*self.phases, None]):
            assert phase is not None
            stop = after.start if after is not None else np.iinfo(np.int64).max
            yield phase, before, stop
            if after is not None:
                before = self._add(before, phase, stop - phase.start)

    def _add(self, before: Mapping[str, int], phase: Phase, n: int) -> dict[str, int]:
        """Return the counts once a phase has given its first n samples."""
        names, table, _ = self._period(phase)
        periods, rest = divmod(n, len(table))
        partly = np.bincount(table[:rest], minlength=len(names))
        given = {name: periods * phase.weights[name] + int(partly[at]) for at, name in enumerate(names)}
        return {name: count + given.get(name, 0) for name, count in before.items()}

    @staticmethod
    def _period(phase: Phase) -> tuple[list[str], np.ndarray, np.ndarray]:
        names = sorted(name for name, weight in phase.weights.items() if weight)
        return names, *period(tuple(phase.weights[name] for name in names))


@lru_cache(maxsize=16)
def period(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each sample of one period, and how many samples of that source come before it there.

    Both have D = sum(weights) entries: int16, then int32. Source i has the share w_i = weights[i] / D, and its count
    after n samples is less than one from w_i * n, for every n: at most 1 - 1/m from it, with m = 2 * sources - 2
    (Tijdeman, "The chairman assignment problem", 1980). So the counts after D samples are the weights themselves, and
    what follows is the same again.

    The bound makes a window of samples for the j-th sample of source i (from 0): not before n = ceil((j + 1/m) / w_i),
    not after n = floor((j + 1 - 1/m) / w_i) + 1, n from 1. Tijdeman's theorem says that all can be met, so the earliest
    deadline among those that are open meets them.
    """
    k, total = len(weights), sum(weights)
    if k == 1:
        return np.zeros(total, np.int16), np.arange(total, dtype=np.int32)
    m = 2 * k - 2
    sources = np.repeat(np.arange(k, dtype=np.int64), weights)
    own = np.concatenate([np.arange(weight, dtype=np.int64) for weight in weights])
    scaled = np.array(weights, dtype=np.int64)[sources] * m
    opens = -(-total * (own * m + 1) // scaled)
    deadline = total * (own * m + m - 1) // scaled + 1
    in_turn = np.argsort(opens, kind="stable")
    opens_at, urgency = opens[in_turn].tolist(), (deadline * k + sources)[in_turn].tolist()
    given = np.empty(total, np.int64)
    waiting: list[int] = []
    at = 0
    for n in range(1, total + 1):
        while at < total and opens_at[at] <= n:
            heapq.heappush(waiting, urgency[at])
            at += 1
        given[n - 1] = heapq.heappop(waiting)
    assert np.all(given // k >= np.arange(1, total + 1)), "a deadline was missed"
    table = (given % k).astype(np.int16)
    by_source = np.argsort(table, kind="stable")
    earlier = np.empty(total, np.int32)
    earlier[by_source] = own
    return table, earlier


def whole_weights(shares: Mapping[str, Fraction]) -> dict[str, int]:
    """Return the smallest whole weights with these relative shares (each above 0), or the nearest ones.

    Shares whose weights would sum to more than `LONGEST_PERIOD` are rounded to weights of that sum (largest
    remainders). The run's weights are then the rounded ones. Raises `ValueError` with the names of sources whose share
    would be 0.
    """
    total = sum(shares.values(), Fraction(0))
    exact = {name: shares[name] / total for name in sorted(shares)}
    denominator = lcm(*(share.denominator for share in exact.values()))
    if denominator <= LONGEST_PERIOD:
        return {name: int(share * denominator) for name, share in exact.items()}
    scaled = {name: share * LONGEST_PERIOD for name, share in exact.items()}
    rounded = {name: int(value) for name, value in scaled.items()}
    by_remainder = sorted(scaled, key=lambda name: (rounded[name] - scaled[name], name))
    for name in by_remainder[: LONGEST_PERIOD - sum(rounded.values())]:
        rounded[name] += 1
    if lost := [name for name, weight in rounded.items() if not weight]:
        raise ValueError(", ".join(lost))
    return rounded


class MixtureOrder:
    """The order of a mixture's samples: an `Order` over the windows of all sources, one source after another.

    Each source has its own permutations and epochs, those of a run on it alone with the same seed.
    """

    def __init__(self, plan: MixturePlan, split: str, seq_len: int, seed: int) -> None:
        self.plan, self.seq_len = plan, seq_len
        self._orders = [
            SampleOrder(source.fingerprint, split, seq_len, source.samples, seed) for source in plan.sources.values()
        ]
        self._first = first_windows(plan)

    def windows(self, k: np.ndarray) -> np.ndarray:
        """Return the window (int64, same shape) of each sample number `k` (int64, from 0)."""
        sources, own = self.plan.locate(k)
        windows = np.empty_like(own)
        for source in np.unique(sources):
            chosen = sources == source
            windows[chosen] = self._first[source] + self._orders[source].windows(own[chosen])
        return windows


def first_windows(plan: MixturePlan) -> np.ndarray:
    """Return the number of each source's first window, and after them the number of all windows."""
    return np.concatenate([[0], np.cumsum([source.samples for source in plan.sources.values()], dtype=np.int64)])


def seen_shares(
    plan: MixturePlan, cursor: int, skip_ranges: Iterable[tuple[int, int]] = ()
) -> dict[str, dict[str, float]]:
    """Return what a run has seen of each source, for its records: samples, share of all, epochs; and its weight now."""
    seen, phase = plan.seen(cursor, skip_ranges), plan.phase_at(max(0, cursor - 1))
    total, weights = max(1, sum(seen.values())), sum(phase.weights.values())
    return {
        name: {
            "samples": seen[name],
            "share": round(seen[name] / total, 6),
            "weight": round(phase.weights.get(name, 0) / weights, 6),
            "epochs": round(seen[name] / source.samples, 4),
        }
        for name, source in plan.sources.items()
    }

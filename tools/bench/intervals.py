"""The median of a few measurements, with a distribution-free confidence interval. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Median:
    """A median with an interval between two measured values.

    `coverage` is the probability that such an interval contains the true median.
    """

    value: float
    low: float
    high: float
    coverage: float
    num_values: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_interval(values: Sequence[float], level: float = 0.95) -> Median:
    """Return the median of independent measurements, with an interval from order statistics.

    Each value is below the true median with probability 1/2, so the k-th smallest and the k-th largest of n enclose it
    with probability `1 - 2 P(Binomial(n, 1/2) < k)` (David and Nagaraja, Order Statistics, 2003, 7.1).
    The narrowest such pair that reaches `level` is used. With fewer than six values no pair reaches 95%; then the
    interval is from the smallest to the largest, and `coverage` is lower.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to take a median of")
    ordered, n = sorted(values), len(values)
    k = max((k for k in range(1, (n + 1) // 2 + 1) if coverage(n, k) >= level), default=1)
    return Median(statistics.median(ordered), ordered[k - 1], ordered[n - k], coverage(n, k), n)


def coverage(n: int, k: int) -> float:
    """Return the probability that the median lies between the k-th smallest and the k-th largest of n values."""
    below = sum(math.comb(n, i) for i in range(k))
    return max(0.0, 1 - 2 * below / 2**n)

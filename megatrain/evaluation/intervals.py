"""Confidence intervals of 95%: Wilson's for a share, and the bootstrap's percentiles for anything else."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_Z = 1.959963984540054
"""The standard normal's 97.5th percentile."""

RESAMPLES = 2000


def wilson(hits: float, count: int) -> tuple[float, float]:
    """Return the score interval of a share of `hits` in `count` > 0 (Wilson, 1927, 10.1080/01621459.1927.10502953)."""
    share, z2 = hits / count, _Z * _Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / count / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int, seed: int) -> np.ndarray:
    """Return the 2.5th and 97.5th percentiles, `[2, ...]`, of a statistic over resamples of `count` items.

    `statistic` maps the indices of a resample to one or several numbers (Efron, 1979, doi:10.1214/aos/1176344552).
    """
    chooser = np.random.default_rng(seed)
    found = np.stack([statistic(chooser.integers(0, count, count)) for _ in range(RESAMPLES)])
    edges: np.ndarray = np.percentile(found, [2.5, 97.5], axis=0)
    return edges

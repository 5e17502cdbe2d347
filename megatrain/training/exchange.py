"""Exchange one report per rank before each step, encoded as integers, in one all-gather."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

NANOSECONDS = 1e9
NUMBERS = 4
"""Of a report before its hashes."""


@dataclass(frozen=True)
class RankReport:
    """Report of one rank before a step.

    - `signal_number`: the signal that asked this rank to stop (0: none)
    - `save_failed`, `can_copy`: the state of its saver
    - `own_time_s`: time of the previous step excluding waits (0: no step yet)
    - `sample_hashes`: hashes of its share of the batch, uint64 `[num_micro_batches * micro_batch_size]`; every rank has
      the same number
    """

    signal_number: int
    save_failed: bool
    can_copy: bool
    own_time_s: float
    sample_hashes: np.ndarray

    def encode(self) -> Tensor:
        """Return the report as int64: four numbers, then the bits of the hashes."""
        numbers = (self.signal_number, self.save_failed, self.can_copy, int(self.own_time_s * NANOSECONDS))
        return torch.from_numpy(np.concatenate([np.array(numbers, np.int64), self.sample_hashes.view(np.int64)]))


@dataclass(frozen=True)
class JobReport:
    """The reports of all ranks, reduced to what the trainer acts on. It is equal on every rank.

    `own_times` are the ranks' `own_time_s`, in rank order. `batch_hash` (16 hex digits) covers all samples of the step.
    """

    signal_number: int
    save_failed: bool
    can_copy: bool
    own_times: list[float]
    batch_hash: str


class Exchange(Protocol):
    """Function that combines the reports of all ranks. Every rank must call it once per step."""

    def __call__(self, report: RankReport) -> JobReport:
        """Return the combined reports of all ranks."""


@dataclass(frozen=True)
class RankExchange:
    """The exchange of a real job.

    `all_gather` stacks every rank's CPU tensor (`[n]` to `[ranks, n]`). `readers` lists one rank per data-parallel
    share, in order. `batch_hash` computes the step's hash from the hashes of those ranks (`[shares, n]`).
    """

    all_gather: Callable[[Tensor], Tensor]
    readers: Sequence[int]
    batch_hash: Callable[[np.ndarray], str]

    def __call__(self, report: RankReport) -> JobReport:
        """Gather the reports of all ranks and reduce them."""
        rows = self.all_gather(report.encode()).numpy()
        signals, failures, copies, own_times = rows[:, :NUMBERS].T
        return JobReport(
            signal_number=int(signals.max()),
            save_failed=bool(failures.any()),
            can_copy=bool(copies.all()),
            own_times=(own_times / NANOSECONDS).tolist(),
            batch_hash=self.batch_hash(rows[list(self.readers), NUMBERS:].view(np.uint64)),
        )

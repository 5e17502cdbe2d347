"""Batches that the loader passes to an engine. Nothing here reads files or knows about ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatrain.kernels.attention import Documents


@dataclass(frozen=True)
class MicroBatch:
    """The sequences that one rank runs through the model at once.

    `tokens` and `labels` are int64 `[B, T]`; labels equal to `IGNORE_INDEX` are ignored. `positions` (int64 `[B, T]`),
    `documents` (where each row's documents end) and `loss_weights` (float32 `[B, T]`) may be None, which means
    positions 0..T-1, attention across the whole window and a weight of 1 for every label.

    Sampled replies have the log-probability that each label was sampled with, `old_log_probs`, its advantage, and its
    log-probability under the reference, if there is one: float32 `[B, T]`.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None = None
    documents: Documents | None = None
    loss_weights: Tensor | None = None
    old_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    reference_log_probs: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """Return a copy on `device`; copies from pinned memory do not block."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        """Return a copy in pinned memory."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> MicroBatch:
        changed: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            changed[f.name] = None if value is None else change(value)
        return MicroBatch(**changed)


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of one optimizer step.

    `sample_hashes` are the xxh3-64 of this rank's samples, uint64 `[num_micro_batches * micro_batch_size]`, in the
    order of its micro-batches. `batch_size` is the number of samples over all ranks; `cursor` is where the next step
    starts. `metrics` are to be recorded with the step; they are equal on all ranks.
    """

    micro_batches: list[MicroBatch]
    sample_hashes: np.ndarray
    batch_size: int
    cursor: int
    metrics: Mapping[str, float] = field(default_factory=dict)

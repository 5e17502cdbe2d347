"""Batches that the loader passes to an engine. Nothing here reads files or knows about ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatrain.kernels.attention import Documents


@dataclass(frozen=True)
class Pairs:
    """The preference pairs of a micro-batch: P pairs, of which `counted` are counted on this rank.

    Reply 2p is the chosen side of pair p and reply 2p + 1 the rejected one. `replies` (int64 `[B, T]`) has the reply
    that each label belongs to, and `ends` (int64 `[B, T]`) the reply whose last token an input is; 2P stands for none.
    `numbers` (int64 `[P]`) are those of the pairs in their dataset, `lengths` (int64 `[2P]`) the labels of each reply
    that count. Context ranks hold slices of `replies` and `ends`, and everything else whole.
    """

    replies: Tensor
    ends: Tensor
    numbers: Tensor
    lengths: Tensor
    _: KW_ONLY
    counted: int

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device, non_blocking: bool = False) -> Pairs:
        """Return a copy on `device`."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Pairs:
        """Return a copy in pinned memory."""
        return self._each(lambda value: value.pin_memory())

    def slice(self, own: Tensor, is_first: bool) -> Pairs:
        """Return a context rank's slice: the inputs `own` of each row. Only the first one counts the pairs."""
        replies, ends = (values[:, own].contiguous() for values in (self.replies, self.ends))
        return replace(self, replies=replies, ends=ends, counted=self.counted if is_first else 0)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Pairs:
        return Pairs(*map(change, (self.replies, self.ends, self.numbers, self.lengths)), counted=self.counted)


@dataclass(frozen=True)
class MicroBatch:
    """The sequences that one rank runs through the model at once.

    `tokens` and `labels` are int64 `[B, T]`; labels equal to `IGNORE_INDEX` are ignored. `positions` (int64 `[B, T]`),
    `documents` (where each row's documents end) and `loss_weights` (float32 `[B, T]`) may be None, which means
    positions 0..T-1, attention across the whole window and a weight of 1 for every label. `pairs` are the preference
    pairs whose replies these are, if the dataset has pairs.

    Sampled replies have the log-probability that each label was sampled with, `old_log_probs`, its advantage, and its
    log-probability under the reference, if there is one: float32 `[B, T]`. Where values are learnt, they have the value
    of each label's place at sampling, `old_values`, and the return that it should have been, `returns`.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None = None
    documents: Documents | None = None
    loss_weights: Tensor | None = None
    old_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    reference_log_probs: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None
    pairs: Pairs | None = None

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

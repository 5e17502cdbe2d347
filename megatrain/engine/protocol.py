"""The Engine protocol: what the trainer and the checkpoint store ask of whoever owns parameters, gradients and states.

Nothing here knows a library; `build.py` chooses the implementation.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatrain.checkpoint.manifest import EngineCounters
from megatrain.data.batch import MicroBatch


def stamp() -> torch.cuda.Event:
    """A mark in the device's work, behind all that it has been given so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as scalars over the whole job, still on the device so that the host may read them late.

    `loss_sum` (float32) is the cross-entropy summed over the `tokens` (int64) that counted, in nats; `grad_norm`
    (float32) is the global gradient norm before clipping, not finite where the step was vetoed; `updated` (bool) says
    whether the parameters moved; `aux` holds further named scalars (`loss_scale` in fp16).
    """

    loss_sum: Tensor
    tokens: Tensor
    grad_norm: Tensor
    updated: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)

    def sent(self) -> SentResult:
        """The same on its way to the host, behind what the device has been given so far and nothing that it is given later."""
        there = [self.loss_sum, self.tokens, self.grad_norm, self.updated, *self.aux.values()]
        here = [
            torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) if t.is_cuda else t
            for t in there
        ]
        arrived = None
        if any(t.is_cuda for t in there):
            arrived = stamp()
        loss_sum, tokens, grad_norm, updated, *aux = here
        return SentResult(
            StepResult(loss_sum, tokens, grad_norm, updated, dict(zip(self.aux, aux, strict=True))), arrived
        )


@dataclass(frozen=True)
class SentResult:
    """A `StepResult` whose scalars are on the host once `arrived` says so (None: they are)."""

    values: StepResult
    arrived: torch.cuda.Event | None

    def comes_within(self, seconds: float) -> bool:
        """Waits at most so long; whether the result is there."""
        deadline = time.monotonic() + seconds
        while self.arrived is not None and not self.arrived.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def seconds_since(self, began: torch.cuda.Event | None) -> float | None:
        """By the device's own clock, once it was read; None without one. What the host took to look is not in it."""
        return None if began is None or self.arrived is None else began.elapsed_time(self.arrived) / 1e3

    def read(self) -> StepResult:
        """The result; waits for that step alone, where `.item()` would wait for all that the device was given since."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values


class Engine(Protocol):
    """Owner of a model's parameters, gradients and optimizer states on one rank."""

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, step: int) -> StepResult:
        """Run one optimizer step over this rank's micro-batches.

        Gradients are those of the mean loss over all tokens of the step in the whole job. They are clipped by their
        global norm, and the update is skipped on every rank when that norm, or any micro-batch's loss, is not finite.
        `step` (1-based) seeds dropout together with the micro-batch's number and the data rank.
        """

    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Summed loss and counted tokens over all ranks' batches. Every rank must bring equally many batches."""

    def state(self) -> dict[str, Tensor]:
        """Single-device names to tensors that know their global place.

        Keys are `model.<name>` and `optim.<moment>.<name>`, all fp32. A tensor is either the whole parameter or a
        `checkpoint.piece.Piece` of it; both alias the engine's own memory, so loading writes in place and must be
        followed by `restore`.
        """

    def counters(self) -> EngineCounters:
        """Return what belongs to the state beside its tensors."""

    def restore(self, counters: EngineCounters | None) -> None:
        """Take over what was written into `state()`; None starts the optimizer from zero."""

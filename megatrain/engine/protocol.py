"""The Engine protocol: what the trainer and the checkpoint store need from the owner of parameters and states.

The protocol does not depend on any training library; `build.py` chooses the implementation.
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
    """Record and return a CUDA event after all work submitted to the device so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(frozen=True)
class StepResult:
    """Scalars of one optimizer step over the whole job. They stay on the device, so that the host can read them later.

    - `loss_sum` (float32): the objective's loss, summed over its terms (next-token prediction: cross-entropy in nats)
    - `tokens` (int64): the number of terms that `loss_sum` sums over (next-token prediction: the tokens that count)
    - `grad_norm` (float32): the global gradient norm before clipping; if it is not finite, the step was skipped
    - `updated` (bool): whether the step changed the parameters
    - `aux`: more scalars by name: the objective's, as means over the terms, and `loss_scale` in fp16
    """

    loss_sum: Tensor
    tokens: Tensor
    grad_norm: Tensor
    updated: Tensor
    aux: dict[str, Tensor] = field(default_factory=dict)

    def sent(self) -> SentResult:
        """Start copying to the host, ordered after work submitted so far."""
        values = [self.loss_sum, self.tokens, self.grad_norm, self.updated, *self.aux.values()]
        copies = [
            torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) if t.is_cuda else t
            for t in values
        ]
        arrived = None
        if any(t.is_cuda for t in values):
            arrived = stamp()
        loss_sum, tokens, grad_norm, updated, *aux = copies
        return SentResult(
            StepResult(loss_sum, tokens, grad_norm, updated, dict(zip(self.aux, aux, strict=True))), arrived
        )


@dataclass(frozen=True)
class SentResult:
    """A `StepResult` whose scalars are on the host once the event `arrived` has passed. None: they already are."""

    values: StepResult
    arrived: torch.cuda.Event | None

    def comes_within(self, seconds: float) -> bool:
        """Wait up to `seconds` and return whether the result has arrived."""
        deadline = time.monotonic() + seconds
        while self.arrived is not None and not self.arrived.query():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def seconds_since(self, began: torch.cuda.Event | None) -> float | None:
        """Return seconds from `began` to the arrival, by the device's clock; None without events. Call `read` first.

        Host polling time is excluded.
        """
        return None if began is None or self.arrived is None else began.elapsed_time(self.arrived) / 1e3

    def read(self) -> StepResult:
        """Return the step's scalars. Wait for this step only; `.item()` would wait for later work too."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values


@dataclass(frozen=True)
class Measured:
    """The result of an evaluation over all ranks: the summed loss (float64), the number of its terms (int64), and the
    objective's scalars by name, as means over the terms (float64)."""

    loss_sum: Tensor
    count: Tensor
    scalars: dict[str, Tensor]

    @staticmethod
    def of(totals: Tensor, names: Sequence[str]) -> Measured:
        """Return the result from sums over all ranks: loss, terms and scalars, float64 `[2 + scalars]`."""
        means = totals[2:] / totals[1].clamp(min=1)
        return Measured(totals[0], totals[1].long(), dict(zip(names, means, strict=True)))


class Engine(Protocol):
    """Owner of a model's parameters, gradients and optimizer states on one rank."""

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float, step: int) -> StepResult:
        """Run one optimizer step over this rank's micro-batches.

        Gradients are those of the mean loss over all terms of the step in the whole job. They are clipped by their
        global norm. If that norm or any micro-batch's loss is not finite, every rank skips the update. `step`
        (1-based), the micro-batch's number and the rank's place in the layout determine the dropout seed.
        """

    def evaluate(self, batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the number of its terms over all ranks. Ranks must pass equally many batches."""

    def measure(self, batches: Iterable[MicroBatch]) -> Measured:
        """Do what `evaluate` does, and return the objective's scalars too."""

    def state(self) -> dict[str, Tensor]:
        """Return the model's and the optimizer's tensors by single-device name.

        Keys are `model.<name>` (fp32) and `optim.<slot>.<name>`. Each tensor is whole or a `checkpoint.piece.Piece`.
        Loading writes into the engine's memory through these tensors, and `restore` must follow.
        """

    def counters(self) -> EngineCounters:
        """Return the part of the state that is not stored in tensors."""

    def restore(self, counters: EngineCounters | None) -> None:
        """Apply what was loaded into `state()`. With None the optimizer starts from step 0."""

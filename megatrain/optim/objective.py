"""What a step minimises: the loss of a micro-batch, with named scalars of its own.

An objective is handed to the engine, which calls it inside the model's forward pass, on the rank (and pipeline stage)
that has the model's output. It is the place to change the loss. The mathematics of cross-entropy is in `kernels/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatrain.data.batch import MicroBatch
from megatrain.kernels import IGNORE_INDEX


class OutputHead(Protocol):
    """The end of a model, whatever the layout: the vocabulary may be cut over ranks, or its logits made in chunks."""

    def cross_entropy_sum(self, hidden: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Return the summed cross-entropy of `labels` `[B, T]` given `hidden` `[B, T, D]`, an fp32 scalar in nats."""


class Objective(Protocol):
    """A loss over micro-batches. Every rank holds an equal one."""

    @property
    def scalar_names(self) -> tuple[str, ...]:
        """Names of its own scalars, in the order in which a call returns them; metrics are recorded under them."""

    def count(self, micro_batch: MicroBatch) -> int:
        """Return how many terms (tokens, pairs, …) the loss of a micro-batch sums; the step's loss is their mean."""

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summed loss, an fp32 scalar with a gradient, and a summed scalar for each of `scalar_names`.

        `hidden` `[B, T, D]` is what the head reads. Under context parallelism both are this rank's slice of the
        sequences.
        """


class NextToken:
    """Next-token prediction: cross-entropy over the labels that count, each multiplied by its loss weight."""

    scalar_names: tuple[str, ...] = ()

    def count(self, micro_batch: MicroBatch) -> int:
        """Return the number of labels that count."""
        return int((micro_batch.labels != IGNORE_INDEX).sum())

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summed cross-entropy, and no scalars."""
        return head.cross_entropy_sum(hidden, micro_batch.labels, micro_batch.loss_weights), ()


class LossMeter:
    """Evaluates an objective where a model's output is, and sums its scalars over the micro-batches of a step."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective = objective
        self.device = device
        self._sums: list[Tensor] = []

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Return the summed loss of a micro-batch; its scalars are added to the step's."""
        loss, scalars = self.objective(head, hidden, micro_batch)
        if scalars:
            found = torch.stack([scalar.detach().double() for scalar in scalars])
            self._sums = [found if not self._sums else self._sums[0] + found]
        return loss

    def count(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Return how many terms the loss of these micro-batches sums over."""
        return sum(map(self.objective.count, micro_batches))

    def take(self) -> Tensor:
        """Return the sums since the last call, float64 `[scalars]`; zeros on a rank that computed no loss."""
        sums, self._sums = self._sums, []
        return (
            sums[0] if sums else torch.zeros(len(self.objective.scalar_names), dtype=torch.float64, device=self.device)
        )

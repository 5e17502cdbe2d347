"""The objective of training: the loss of a micro-batch, and named scalars to record with it.

The engine calls the objective inside the model's forward pass, on the ranks (and the pipeline stage) that have the
model's output. To change the loss, write another objective. Cross-entropy itself is in `kernels/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatrain.data.batch import MicroBatch
from megatrain.kernels import IGNORE_INDEX

SQUARED = "_squared"
"""The end of a scalar's name that is the square of another one, for its standard error. It is not recorded itself."""

TOKENS = "tokens_a_term"
"""The name of the scalar that has the tokens of each term, if its terms are no tokens."""


class OutputHead(Protocol):
    """The output head of a model in any layout. Ranks may split the vocabulary; logits may be computed in chunks."""

    def cross_entropy_sum(
        self, hidden: Tensor, labels: Tensor, weights: Tensor | None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return the summed cross-entropy of `labels` `[B, T]` given `hidden` `[B, T, D]`, an fp32 scalar in nats.

        With `label_smoothing` a label has that share less of the probability, and all tokens have equal parts of it
        (Szegedy et al., 2015, arXiv:1512.00567, section 7).
        """

    def token_log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the log-probability of each of `labels` `[B, T]` given `hidden` `[B, T, D]`, fp32 `[B, T]`, in nats.

        It is 0, without a gradient, where a label is `IGNORE_INDEX`. Memory is that of `cross_entropy_sum`. The
        backward pass may run only once.
        """

    @property
    def context_size(self) -> int:
        """Return over how many ranks context parallelism cuts a sequence."""

    def sum_over_context(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the ranks that hold the other slices of these sequences, in their shape.

        For losses of whole sequences. All these ranks must compute the same loss from the sum, and each returns the
        share `1 / context_size` of it, so that the job's sum counts it once.
        """


class ScoreHead(OutputHead, Protocol):
    """The head of a model that gives each token a score (`model.output=score`)."""

    def token_scores(self, hidden: Tensor) -> Tensor:
        """Return the score of each token given `hidden` `[B, T, D]`, fp32 `[B, T]`."""


class ValueHead(OutputHead, Protocol):
    """The head of a model that estimates the value of each token too (`WITH_VALUES`)."""

    def token_values(self, hidden: Tensor) -> Tensor:
        """Return the value of each token given `hidden` `[B, T, D]`, fp32 `[B, T]`."""


class Objective(Protocol):
    """A loss over micro-batches. All ranks must use the same one."""

    @property
    def scalar_names(self) -> tuple[str, ...]:
        """Names of the scalars that a call returns, in order. Metrics are recorded under these names."""

    def count(self, micro_batch: MicroBatch) -> int:
        """Return the number of terms (tokens, pairs, …) in a micro-batch's loss. A step's loss is their mean."""

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summed loss (an fp32 scalar with a gradient) and one summed scalar for each of `scalar_names`.

        `hidden` `[B, T, D]` is the input of the head. With context parallelism, `hidden` and `micro_batch` are this
        rank's slice of the sequences.
        """


class NextToken:
    """Next-token prediction: cross-entropy over labels other than `IGNORE_INDEX`, times their loss weights.

    Labels are smoothed in training alone, so that losses of evaluations compare.
    """

    scalar_names: tuple[str, ...] = ()

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def count(self, micro_batch: MicroBatch) -> int:
        """Return the number of labels that are not `IGNORE_INDEX`."""
        return int((micro_batch.labels != IGNORE_INDEX).sum())

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summed cross-entropy and no scalars."""
        labels, weights = micro_batch.labels, micro_batch.loss_weights
        if self.label_smoothing and torch.is_grad_enabled():
            return head.cross_entropy_sum(hidden, labels, weights, self.label_smoothing), ()
        return head.cross_entropy_sum(hidden, labels, weights), ()


class LossMeter:
    """Wrapper of an objective that sums its scalars over the micro-batches of a step."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective = objective
        self.device = device
        self._sums: list[Tensor] = []

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        """Return the summed loss of a micro-batch, and add its scalars to the step's sums."""
        loss, scalars = self.objective(head, hidden, micro_batch)
        if scalars:
            found = torch.stack([scalar.detach().double() for scalar in scalars])
            self._sums = [found if not self._sums else self._sums[0] + found]
        return loss

    def count(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Return the number of terms in the loss of these micro-batches."""
        return sum(map(self.objective.count, micro_batches))

    def take(self) -> Tensor:
        """Return the scalars' sums since the last call, float64 `[scalars]`; zeros if this rank computed no loss."""
        sums, self._sums = self._sums, []
        return (
            sums[0] if sums else torch.zeros(len(self.objective.scalar_names), dtype=torch.float64, device=self.device)
        )

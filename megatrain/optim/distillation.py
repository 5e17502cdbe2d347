"""The objective of distillation: learning the distribution of a larger model, the teacher, beside the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from megatrain.data.batch import MicroBatch
from megatrain.errors import ConfigError
from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.distillation import Sums, Teaching
from megatrain.model.gpt import GPT
from megatrain.optim.objective import OutputHead


class StudentHead(OutputHead, Protocol):
    """An output head that can be compared with a teacher's."""

    def distillation_sums(self, hidden: Tensor, labels: Tensor, weights: Tensor | None, teaching: Teaching) -> Sums:
        """Return the loss given `hidden` `[B, T, D]`, and its parts: cross-entropy and divergence, summed over tokens.

        Only the loss has a gradient.
        """


@dataclass
class Distillation:
    """A mix of the cross-entropy of the labels and of the divergence from the teacher's distribution (`Teaching`).

    The `teacher` is in eval mode and holds the same slices of sequences as the head; ranks without a head need none.
    The loss of an evaluation is the cross-entropy alone, so that it compares with that of other methods.
    """

    share: float
    temperature: float
    mix: float
    teacher: GPT | None = None

    scalar_names = ("cross_entropy", "divergence")

    def count(self, micro_batch: MicroBatch) -> int:
        """Return the number of labels that are not `IGNORE_INDEX`."""
        return int((micro_batch.labels != IGNORE_INDEX).sum())

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summed loss, and the sums of cross-entropy and divergence in nats."""
        if self.teacher is None:
            raise ConfigError("method=distill: the teacher is missing; train through a run")
        with torch.no_grad():
            theirs = self.teacher.hidden(
                micro_batch.tokens, positions=micro_batch.positions, documents=micro_batch.documents
            )
        weight = self.teacher.head.weight.detach()
        teaching = Teaching(theirs, weight, self.temperature, self.share, self.mix)
        loss, cross_entropy, divergence = cast(StudentHead, head).distillation_sums(
            hidden, micro_batch.labels, micro_batch.loss_weights, teaching
        )
        return loss if torch.is_grad_enabled() else cross_entropy, (cross_entropy, divergence)

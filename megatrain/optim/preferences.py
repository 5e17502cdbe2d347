"""Objectives over preference pairs: direct preference optimisation, and a reward model. A term of the loss is a pair.

The sides of a pair are documents of one row that cannot see each other. What a side is worth, its log-probability or
its reward, is a sum over its tokens, which context ranks share; the loss of a pair is computed from two such sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from megatrain.data.batch import MicroBatch, Pairs
from megatrain.errors import ConfigError
from megatrain.optim.objective import SQUARED, TOKENS, OutputHead, ScoreHead


def pairs_of(micro_batch: MicroBatch) -> Pairs:
    """Return the pairs of a micro-batch. Raises `ConfigError` if its dataset has none."""
    if micro_batch.pairs is None:
        raise ConfigError("method: learning from preferences needs a dataset of pairs; prepare one with data=pairs")
    return micro_batch.pairs


def reply_sums(values: Tensor, replies: Tensor, num_pairs: int) -> Tensor:
    """Return the sum of `values` `[B, T]` over each reply, `[P, 2]`; `replies` (int64 `[B, T]`) as in `Pairs`."""
    sums = values.new_zeros(2 * num_pairs + 1).index_add(0, replies.flatten(), values.flatten())
    return sums[:-1].view(num_pairs, 2)


def preference_loss(difference: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return `-(1 - e) log sigmoid(d) - e log sigmoid(-d)` for `e = smoothing`: e of the labels are taken for wrong."""
    loss = -F.logsigmoid(difference)
    return loss if not smoothing else (1 - smoothing) * loss - smoothing * F.logsigmoid(-difference)


class _PairObjective:
    """What objectives over pairs have in common."""

    def count(self, micro_batch: MicroBatch) -> int:
        """Return the number of pairs that are counted on this rank."""
        return pairs_of(micro_batch).counted


@dataclass
class ReferenceTable:
    """Log-probabilities under the reference: of the chosen and the rejected side of each pair of a dataset, `[N, 2]`.

    While they are `recorded`, float64 `[N, 3]`, the objective adds what it computes: both sums, and how often.
    """

    log_probs: Tensor | None = None
    recorded: Tensor | None = None

    @contextmanager
    def recording(self, num_pairs: int, device: torch.device) -> Iterator[Tensor]:
        """Record log-probabilities, instead of comparing with them, until the context ends."""
        self.recorded = torch.zeros((num_pairs, 3), dtype=torch.float64, device=device)
        try:
            yield self.recorded
        finally:
            self.recorded = None


@dataclass
class DirectPreference(_PairObjective):
    """Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290), with a supervised term.

    With the log-probabilities of both sides under the model, `c` and `r`, and under the reference, the base:

        d = beta ((c - c_ref) - (r - r_ref)),
        loss = -(1 - e) log sigmoid(d) - e log sigmoid(-d) - w c / n.

    `e` is the share of wrong labels (conservative DPO), `w` the weight of the supervised term and `n` the tokens of the
    chosen reply (Pang et al., 2024, arXiv:2404.19733). Without that term the log-probability of both sides may fall.
    """

    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 1.0
    reference: ReferenceTable = field(default_factory=ReferenceTable)

    scalar_names = (
        "accuracy",
        "margin",
        "chosen_reward",
        "rejected_reward",
        "chosen_log_prob",
        "rejected_log_prob",
        "sft_loss",
        f"loss{SQUARED}",
        TOKENS,
    )

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summed loss of the pairs, and the sums of their metrics."""
        pairs = pairs_of(micro_batch)
        log_probs = head.token_log_probs(hidden, micro_batch.labels)
        sums = head.sum_over_context(reply_sums(log_probs, pairs.replies, len(pairs)))
        if self.reference.recorded is not None:
            found = torch.cat([sums.detach().double(), torch.ones_like(sums[:, :1], dtype=torch.float64)], dim=1)
            self.reference.recorded.index_add_(0, pairs.numbers, found)
            return sums.sum() * 0, [sums.new_zeros(())] * len(self.scalar_names)
        if self.reference.log_probs is None:
            raise ConfigError("method=dpo: the log-probabilities of the reference are missing; train through a run")
        rewards = self.beta * (sums - self.reference.log_probs[pairs.numbers])
        difference = rewards[:, 0] - rewards[:, 1]
        lengths = pairs.lengths.view(-1, 2)
        sft = -sums[:, 0] / lengths[:, 0].clamp(min=1)
        losses = preference_loss(difference, self.label_smoothing) + self.sft_weight * sft
        metrics = [difference > 0, difference, *rewards.unbind(1), *sums.unbind(1), sft, losses**2, lengths.sum(1)]
        share = 1 / head.context_size
        return losses.sum() * share, [metric.detach().double().sum() * share for metric in metrics]


@dataclass
class PairReward(_PairObjective):
    """A reward model after Bradley and Terry (Ouyang et al., 2022, arXiv:2203.02155, equation 1).

    The reward of a side is the score of its last token. With those of both sides, `c` and `r`:

        loss = -log sigmoid(c - r - margin) + centering (c + r)^2.

    Centering keeps the rewards near 0, which pairs alone leave open (Eisenstein et al., 2023, arXiv:2312.09244).
    """

    margin: float = 0.0
    centering: float = 0.0

    scalar_names = ("accuracy", "margin", "chosen_reward", "rejected_reward", f"loss{SQUARED}", TOKENS)

    def __call__(self, head: OutputHead, hidden: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the summed loss of the pairs, and the sums of their metrics."""
        pairs = pairs_of(micro_batch)
        scores = cast(ScoreHead, head).token_scores(hidden)
        rewards = head.sum_over_context(reply_sums(scores, pairs.ends, len(pairs)))
        difference = rewards[:, 0] - rewards[:, 1]
        losses = preference_loss(difference - self.margin) + self.centering * rewards.sum(1) ** 2
        tokens = pairs.lengths.view(-1, 2).sum(1)
        metrics = [difference > 0, difference, *rewards.unbind(1), losses**2, tokens]
        share = 1 / head.context_size
        return losses.sum() * share, [metric.detach().double().sum() * share for metric in metrics]

"""Several models that predict together: the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatrain.kernels.attention import Documents
from megatrain.model.gpt import GPT


class Ensemble(nn.Module):
    """Models of one vocabulary, as one that computes losses and is sampled from. Their sizes may differ.

    `config` is that of the member that takes the shortest sequences.
    """

    def __init__(self, members: Sequence[GPT]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.context_size = 1
        self.widths = [member.config.hidden_size for member in members]
        self.config = min(
            (member.config for member in members), key=lambda config: (config.max_seq_len, config.position != "learned")
        )

    def each(self) -> list[GPT]:
        """Return the members."""
        return [member for member in self.members if isinstance(member, GPT)]

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Documents | None = None,
        dropout_seed: int | None = None,
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return `finish` of the members' hidden states side by side, `[B, T, sum of D]`; arguments as in `GPT`."""
        hidden = [
            member.hidden(tokens, positions=positions, documents=documents, dropout_seed=dropout_seed)
            for member in self.each()
        ]
        return finish(torch.cat(hidden, dim=-1))

    def cross_entropy_sum(
        self, x: Tensor, labels: Tensor, weights: Tensor | None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return the summed cross-entropy of `labels` `[B, T]` under the mean of the probabilities, in nats."""
        assert not label_smoothing, "labels are smoothed in training alone"
        losses = -self.token_log_probs(x, labels)
        return (losses if weights is None else losses * weights).sum()

    def token_log_probs(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return the logarithm of each label's mean probability, `[B, T]`; 0 where a label is `IGNORE_INDEX`."""
        hidden = x.split(self.widths, dim=-1)
        return mean_probability(
            [member.token_log_probs(part, labels) for member, part in zip(self.each(), hidden, strict=True)]
        )

    def sum_over_context(self, values: Tensor) -> Tensor:
        """Return `values`: no rank holds another slice of these sequences."""
        return values


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the logarithms of the probabilities `[..., V]`, in float32 or wider."""
    return logits.float().log_softmax(-1)


def mean_probability(logs: Sequence[Tensor]) -> Tensor:
    """Return the logarithm of the mean of probabilities that are given as logarithms, all of one shape."""
    return torch.stack(list(logs)).logsumexp(0) - math.log(len(logs))

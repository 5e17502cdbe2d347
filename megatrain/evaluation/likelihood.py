"""Log-likelihoods of continuations, in batches. Knows no tokenizer, no tasks and no files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.model.gpt import GPT

MAX_LOGITS = 2**25
"""Most logits to hold at a time: with a vocabulary of 128,000 those of 262 positions."""


@dataclass(frozen=True)
class Pair:
    """A context and what follows it, as token ids; both have at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a continuation, in nats, and whether each of its tokens is the likeliest one there."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class _Row:
    """A sequence to run through the model, and the requests that read its last positions."""

    tokens: tuple[int, ...]
    requests: list[int]


@torch.no_grad()
def likelihoods(model: GPT, pairs: Sequence[Pair], batch_size: int, longest: int) -> Iterator[tuple[int, Likelihood]]:
    """Yield each pair's number and likelihood, the longest sequences first. Sequences that are equal run once.

    Of a pair with more than `longest` + 1 tokens the first are left out. The model must be in eval mode.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, pair in enumerate(pairs):
        tokens = (*pair.context, *pair.continuation)[-(longest + 1) :]
        rows.setdefault(tokens[:-1], []).append(number)
    ordered = [_Row(tokens, found) for tokens, found in sorted(rows.items(), key=lambda row: (-len(row[0]), row[0]))]
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        hidden = _hidden(model, [row.tokens for row in batch])
        for number, (row, states) in enumerate(zip(batch, hidden, strict=True)):
            assert len(row.tokens) <= states.shape[0], number
            for request in row.requests:
                wanted = pairs[request].continuation[-len(row.tokens) :]
                yield request, _likelihood(model, states[len(row.tokens) - len(wanted) : len(row.tokens)], wanted)


def _hidden(model: GPT, sequences: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the head's input `[B, T, D]`. Padding is on the right, where causal attention ignores it."""
    device, longest = model.embed.weight.device, max(map(len, sequences))
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    return model.hidden(tokens.to(device))


def _likelihood(model: GPT, states: Tensor, continuation: Sequence[int]) -> Likelihood:
    """Return the likelihood of a continuation given the head's input at its positions, `[C, D]`."""
    total, is_greedy = 0.0, True
    wanted = torch.tensor(continuation, device=states.device)
    rows = max(1, MAX_LOGITS // model.config.vocab)
    for part, targets in zip(states.split(rows), wanted.split(rows), strict=True):
        logits = model.head(part[None])[0].float()
        total += float(logits.log_softmax(-1).gather(-1, targets[:, None]).double().sum())
        is_greedy = is_greedy and bool((logits.argmax(-1) == targets).all())
    return Likelihood(total, is_greedy)

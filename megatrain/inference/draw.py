"""Draw the next tokens of several sequences at once, each by its own settings and its own random numbers.

A random number is a pure function of a request's seed and of the number of tokens drawn before, so that a reply does
not depend on what else is in the batch, and no random state needs to be kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatrain.errors import ConfigError

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SamplingSettings:
    """How to continue a prompt. Temperature 0 is greedy; `top_k=0` keeps all ids, `top_p=1` all probability.

    `stop_ids` are the ids that end a reply. `top_logprobs` is how many of the likeliest ids to report with each token.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a value out of its bounds."""
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_logprobs": (self.top_logprobs >= 0, "at least 0"),
        }
        for name, (is_inside, expected) in bounds.items():
            if not is_inside:
                raise ConfigError(f"{name}={getattr(self, name)}: expected {expected}")


@dataclass(frozen=True)
class Drawn:
    """A drawn id, and its log-probability in nats; `top` has the likeliest ids with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def uniform(seed: int, index: int) -> float:
    """Return number `index` of a seed's random numbers, at least 0 and below 1.

    It is SplitMix64's (Steele et al., 2014), whose state after any number of draws is known at once.
    """
    return (_mixed(_mixed(seed % 2**64) + (index + 1) * _GOLDEN) >> 11) / 2**53


def _mixed(state: int) -> int:
    state %= 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def draw(logits: Tensor, settings: Sequence[SamplingSettings], numbers: Sequence[int]) -> list[Drawn]:
    """Draw an id from each row of `logits` `[N, V]`, after `numbers` tokens of that request.

    Log-probabilities are those of the distribution after the temperature (1 where it is 0) and before `top_k` and
    `top_p`.
    """
    device = logits.device
    temperatures = torch.tensor([one.temperature or 1.0 for one in settings], dtype=torch.float64).to(device)
    # in fp64, and from the largest: the smallest temperatures are 0 in fp32, and logits divided by them overflow
    scaled = (logits - logits.amax(-1, keepdim=True)).double()
    scaled = (scaled / temperatures.clamp(min=sys.float_info.min)[:, None]).float()
    logprobs = scaled.log_softmax(-1)
    tokens = scaled.argmax(-1)
    if sampled := [row for row, one in enumerate(settings) if one.temperature > 0]:
        rows = torch.tensor(sampled, device=device)
        kept = _truncated(scaled[rows], [settings[row] for row in sampled])
        draws = [uniform(settings[row].seed, numbers[row]) for row in sampled]
        tokens[rows] = _inverse(kept, torch.tensor(draws, dtype=torch.float64).to(device))
    most = min(max(one.top_logprobs for one in settings), logits.shape[-1])
    likeliest = logprobs.topk(most) if most else None
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    tops: list[list[tuple[int, float]]] = [[] for _ in settings]
    if likeliest is not None:
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        tops = [
            list(zip(ids, values, strict=True))[: one.top_logprobs]
            for (ids, values), one in zip(pairs, settings, strict=True)
        ]
    return [Drawn(*parts) for parts in zip(tokens.tolist(), chosen.tolist(), tops, strict=True)]


def _truncated(logits: Tensor, settings: Sequence[SamplingSettings]) -> Tensor:
    """Return logits `[N, V]` with -inf for the ids that `top_k` and `top_p` exclude, as model/sampling.py does."""
    vocab = logits.shape[-1]
    cut = [row for row, one in enumerate(settings) if 0 < one.top_k < vocab or one.top_p < 1]
    if not cut:
        return logits
    rows = torch.tensor(cut, device=logits.device)
    ordered, ids = logits[rows].sort(descending=True, stable=True)
    last = torch.tensor([min(settings[row].top_k or vocab, vocab) - 1 for row in cut], device=logits.device)
    top_p = torch.tensor([settings[row].top_p for row in cut], dtype=torch.float64).to(logits.device)
    excluded = ordered < ordered.gather(-1, last[:, None])
    probabilities = ordered.masked_fill(excluded, -torch.inf).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # of all likelier ids
    excluded |= (before >= top_p[:, None]) & (top_p < 1)[:, None]
    excluded[:, 0] = False
    result = logits.clone()
    result[rows] = logits[rows].masked_fill(torch.zeros_like(excluded).scatter(-1, ids, excluded), -torch.inf)
    return result


def _inverse(logits: Tensor, numbers: Tensor) -> Tensor:
    """Return the ids `[N]` at which the cumulative distribution of `logits` `[N, V]` exceeds the numbers in [0, 1)."""
    cumulative = logits.softmax(-1).double().cumsum(-1)
    total = cumulative[:, -1]
    # below the total, which rounding could reach, or the id behind the last possible one would be drawn
    targets = torch.minimum(numbers * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)  # beyond it only where logits are no numbers

"""Continue several prompts at once. `model/sampling.py` continues one; the draws are its own.

Prompts of a batch run without padding: the model first reads as many tokens of each as the shortest one has, then one
position at a time, where longer prompts go on with their own tokens and the others with what was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.model.cache import KVCache
from megatrain.model.gpt import GPT
from megatrain.model.sampling import draw


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; see `model.sampling.generate`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue with at most `max_new_tokens`, drawn with a generator that begins with `seed`.

    `is_over` gets each drawn token and returns whether it ends the continuation, which then lacks it.
    """

    ids: Sequence[int]
    max_new_tokens: int
    seed: int
    is_over: Callable[[int], bool]


def continuations(
    model: GPT, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield each prompt's number and the ids that continue it, the longest prompts first.

    A continuation does not depend on what else is in its batch, but for rounding. The model must be in eval mode.
    """
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        yield from zip(numbers, _continue_batch(model, [prompts[number] for number in numbers], sampling), strict=True)


@torch.no_grad()
def _continue_batch(model: GPT, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
    weight = model.embed.weight
    generators = [torch.Generator().manual_seed(prompt.seed % 2**64) for prompt in prompts]
    drawn: list[list[int]] = [[] for _ in prompts]
    is_open = [prompt.max_new_tokens > 0 for prompt in prompts]
    capacity = max(len(prompt.ids) + prompt.max_new_tokens for prompt in prompts)
    cache = KVCache(model.config, len(prompts), capacity, weight.device, weight.dtype)
    shortest = min(len(prompt.ids) for prompt in prompts)
    tokens, at = [list(prompt.ids[:shortest]) for prompt in prompts], 0
    while any(is_open):
        last = model.hidden(torch.tensor(tokens, device=weight.device), cache=cache)[:, -1]
        at += len(tokens[0])
        drawing = [row for row, prompt in enumerate(prompts) if is_open[row] and len(prompt.ids) <= at]
        if drawing:
            logits: Tensor = model.head(last[drawing][:, None])[:, 0].float().cpu()
            for row, scores in zip(drawing, logits, strict=True):
                token = draw(scores, sampling.temperature, sampling.top_k, sampling.top_p, generators[row])
                is_over = prompts[row].is_over(token)
                if not is_over:
                    drawn[row].append(token)
                is_open[row] = not is_over and len(drawn[row]) < prompts[row].max_new_tokens
        tokens = [[_token_at(prompt.ids, found, at)] for prompt, found in zip(prompts, drawn, strict=True)]
    return drawn


def _token_at(prompt: Sequence[int], drawn: Sequence[int], at: int) -> int:
    """Return the token at a position of a row; 0 after its end, as what a finished row computes is not read."""
    if at < len(prompt):
        return prompt[at]
    return drawn[at - len(prompt)] if at - len(prompt) < len(drawn) else 0

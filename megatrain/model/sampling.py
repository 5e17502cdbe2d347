"""Sample token ids from a model, one at a time, with a cache of keys and values. Knows no tokenizer and no files."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from megatrain.errors import ConfigError
from megatrain.model.cache import KVCache
from megatrain.model.ensemble import Ensemble, log_probabilities, mean_probability
from megatrain.model.gpt import GPT

log = logging.getLogger(__name__)


def generate(
    model: GPT | Ensemble,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield the ids that continue `prompt_ids`: at most `max_new_tokens`, ending before one of `stop_ids`.

    `temperature=0` is greedy. Otherwise logits are divided by the temperature and restricted to the `top_k` likeliest
    ids (0 keeps all), then to the likeliest ids that together have a probability of `top_p` (Holtzman et al., 2019,
    arXiv:1904.09751). A CPU generator seeded with `seed` draws from them, whatever the model's device. The logits of an
    ensemble are the logarithms of its mean probabilities. The model is put in eval mode. With rotary positions,
    generation past `max_seq_len` logs a warning and continues.

    Raises:
        ConfigError: at once, for an empty prompt, an id outside the vocabulary, or more tokens than a model with
            learned positions has positions.
    """
    check_request(model, prompt_ids, max_new_tokens)
    model.eval()
    generator = torch.Generator().manual_seed(seed % 2**64)
    return _sample(model, prompt_ids, max_new_tokens, temperature, top_k, top_p, generator, stop_ids)


def check_request(model: GPT | Ensemble, prompt_ids: list[int], max_new_tokens: int) -> None:
    """Raise `ConfigError` if the model cannot take the prompt, or cannot generate that many tokens after it."""
    config = model.config
    if not prompt_ids:
        raise ConfigError("prompt: no tokens to continue; give some text, or the end-of-document token to start afresh")
    outside = [token for token in prompt_ids if not 0 <= token < config.vocab]
    if outside:
        raise ConfigError(f"prompt: token id {outside[0]} is outside the model's vocabulary of {config.vocab}")
    # The last token drawn is never fed back, so it needs no position.
    longest = config.max_seq_len - len(prompt_ids) + 1
    if max_new_tokens <= longest:
        return
    asked = f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={max_new_tokens} exceed model.max_seq_len="
    if config.position == "rope":
        log.warning("%s%d: the model was not trained at such positions", asked, config.max_seq_len)
    elif longest > 0:
        raise ConfigError(f"{asked}{config.max_seq_len}, and positions are learned; try max_new_tokens={longest}")
    else:
        raise ConfigError(f"{asked}{config.max_seq_len}; positions are learned, so the prompt must be shorter")


def _sample(
    model: GPT | Ensemble,
    prompt_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
    stop_ids: Collection[int],
) -> Iterator[int]:
    members = model.each() if isinstance(model, Ensemble) else [model]
    caches = [_cache(member, len(prompt_ids) + max_new_tokens - 1) for member in members]
    tokens = prompt_ids
    for _ in range(max_new_tokens):
        # The guard covers only the models: a yield inside it would leave gradients off in the caller.
        with torch.no_grad():
            found = [_next_logits(member, tokens, cache) for member, cache in zip(members, caches, strict=True)]
            logits = found[0] if len(found) == 1 else mean_probability([log_probabilities(each) for each in found])
        drawn = draw(logits, temperature, top_k, top_p, generator)
        if drawn in stop_ids:
            return
        yield drawn
        tokens = [drawn]


def _cache(model: GPT, capacity: int) -> KVCache:
    weight = model.embed.weight
    return KVCache(model.config, 1, capacity, weight.device, weight.dtype)


def _next_logits(model: GPT, tokens: list[int], cache: KVCache) -> Tensor:
    """Return the fp32 logits `[V]` of what follows `tokens`, which continue those in the cache, on the CPU."""
    last = model.hidden(torch.tensor([tokens], device=model.embed.weight.device), cache=cache)[:, -1]
    logits: Tensor = model.head(last)[0].float().cpu()
    return logits


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Draw one id from fp32 logits `[V]`; arguments as in `generate`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = distribution(logits, temperature, top_k, top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def distribution(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the probabilities `[V]` that `draw` draws from: 0 for excluded ids; the rest sum to 1.

    The likeliest id is always kept.
    """
    # in fp64, and from the largest: the smallest temperatures are 0 in fp32, and logits divided by them overflow
    logits = ((logits - logits.max()).double() / max(temperature, sys.float_info.min)).float()
    if 0 < top_k < logits.numel():
        smallest_kept = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p < 1:
        ordered, ids = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of all likelier ids
        excluded = before >= top_p
        excluded[0] = False
        logits = logits.masked_fill(torch.zeros_like(excluded).scatter(0, ids, excluded), -torch.inf)
    return logits.softmax(-1)

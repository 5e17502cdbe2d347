"""Continue several prompts, each until a function of its own says that it is over. `inference/` generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatrain.errors import DivergedError
from megatrain.inference.batch_generator import BatchGenerator
from megatrain.inference.draw import SamplingSettings
from megatrain.model.gpt import GPT


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue. `is_over` gets each drawn token and returns whether it ends the continuation."""

    ids: Sequence[int]
    settings: SamplingSettings
    is_over: Callable[[int], bool]


def continuations(model: GPT, prompts: Sequence[Prompt], batch_size: int) -> Iterator[int]:
    """Continue prompts, `batch_size` at a time, and yield the number of each that is over.

    A continuation does not depend on what else is in the batch, but for rounding.

    Raises:
        ConfigError: a prompt with its continuation is too long for the model.
        DivergedError: the model's logits are no numbers.
    """
    if not prompts:
        return
    capacity = max(len(prompt.ids) + prompt.settings.max_new_tokens for prompt in prompts)
    generator = BatchGenerator(model, min(batch_size, len(prompts)), capacity)
    numbers = {generator.add(prompt.ids, prompt.settings): number for number, prompt in enumerate(prompts)}
    while generator.num_active or generator.num_waiting:
        for token in generator.step():
            if token.finish == "error":
                raise DivergedError("the model's logits are NaN or infinite, so no token can be drawn")
            number = numbers[token.request]
            is_over = prompts[number].is_over(token.id)
            if is_over and token.finish is None:
                generator.cancel(token.request)
            if is_over or token.finish is not None:
                yield number

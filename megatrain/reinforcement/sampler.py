"""Sample replies with a whole model on every rank, judge them, and gather them so that all ranks hold all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from megatrain.config import WITH_VALUES, MethodConfig
from megatrain.data.chat.prompt import Prompt
from megatrain.data.tokenizer import Tokenizer
from megatrain.distributed.world import World
from megatrain.errors import DivergedError, MegatrainError, RewardError
from megatrain.inference.batch_generator import BatchGenerator
from megatrain.inference.draw import SamplingSettings
from megatrain.kernels import IGNORE_INDEX
from megatrain.model.gpt import GPT
from megatrain.reinforcement.judge import Judge
from megatrain.reinforcement.reward_model import BATCH
from megatrain.reinforcement.rewards import Replies

T = TypeVar("T")

LONG_PROMPT = 256
"""Mean tokens of a prompt from which on its computation is shared by its group: looking for it costs time too."""

PROMPT_TOKENS = 4096
"""Tokens of prompts that are computed at once."""

_PASSED_ON = {kind.__name__: kind for kind in (RewardError, DivergedError)}
"""Errors of one rank that all ranks raise, so that they can save together."""


@dataclass(frozen=True)
class Samples:
    """The replies to a step's prompts, in sample order, equal on every rank.

    `ids` has the token that stopped a reply; `stopped` says whether one did. `log_probs` are in nats, at the sampling
    temperature. `rewards` is float64 `[R, rewards]`, `reference` has log-probabilities under the reference (or None),
    `values` those of the tokens' places if the model estimates them (or None).
    """

    ids: list[list[int]]
    log_probs: list[list[float]]
    stopped: np.ndarray
    rewards: np.ndarray
    reference: list[list[float]] | None
    values: list[list[float]] | None = None


def reply_seed(seed: int, sample: int) -> int:
    """Return the seed of a reply's random numbers: a pure function of the run's seed and the sample's number."""
    return xxhash.xxh3_64_intdigest(f"reply:{seed}:{sample}".encode())


class Sampler:
    """Samples replies on all ranks, each its share. `stop_ids` end a reply, `reference` is the model of the KL term.

    `rewards` judges the replies.
    """

    def __init__(
        self,
        method: MethodConfig,
        seed: int,
        world: World,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        rewards: Judge,
        reference: GPT | None = None,
    ) -> None:
        self.method, self.seed, self.world, self.tokenizer = method, seed, world, tokenizer
        self.stop_ids, self.rewards, self.reference = frozenset(stop_ids), rewards, reference
        self.has_values = method.name in WITH_VALUES

    def __call__(self, model: GPT, prompts: Sequence[Prompt], samples: np.ndarray, is_greedy: bool = False) -> Samples:
        """Return the replies of `model` to `prompts`, one for each of the run's `samples` (their numbers).

        Replies that are greedy have nothing that training needs: no reference and no values.

        Raises:
            RewardError, DivergedError: on every rank, if any rank's rewards fail or its logits are no numbers.
        """
        bounds = np.linspace(0, len(prompts), self.world.size + 1).round().astype(int).tolist()
        own = slice(bounds[self.world.rank], bounds[self.world.rank + 1])
        found = self._together(lambda: self._sample(model, prompts[own], samples[own], is_greedy))
        return self._scored(self._gathered(found, int(np.diff(bounds).max())), prompts)

    def _together(self, share: Callable[[], T]) -> T:
        """Return this rank's share of some work. Every rank raises what the rewards or logits of any rank raise."""
        found: T | None = None
        problem: list[str] | None = None
        try:
            found = share()
        except MegatrainError as error:
            problem = [type(error).__name__, str(error)]
            if problem[0] not in _PASSED_ON:
                raise
        if problem := next(filter(None, self.world.all_gather_json(problem)), None):
            raise _PASSED_ON[problem[0]](problem[1])
        assert found is not None
        return found

    def _scored(self, found: Samples, prompts: Sequence[Prompt]) -> Samples:
        """Return the samples of all ranks with what reward models give them.

        A batch has the same replies in every layout, whichever rank scores it, and so the same scores.
        """
        if not self.rewards.models:
            return found
        texts = self._texts(found.ids, found.stopped.tolist())
        replies = Replies([prompt.prompt for prompt in prompts], texts, found.stopped.tolist(), {})
        batches = [replies.part(slice(first, first + BATCH)) for first in range(0, len(texts), BATCH)]
        rank, size = self.world.rank, self.world.size
        own = self._together(lambda: [self.rewards.of_models(batch).tolist() for batch in batches[rank::size]])
        by_rank = self.world.all_gather_json(own)
        scores = [row for number in range(len(batches)) for row in by_rank[number % size][number // size]]
        return replace(found, rewards=self.rewards.joined(found.rewards, np.array(scores)))

    def _texts(self, ids: Sequence[list[int]], stopped: Sequence[bool]) -> list[str]:
        """Return the replies' texts, without the token that stopped one."""
        return [
            self.tokenizer.decode(reply[:-1] if ended else reply) for reply, ended in zip(ids, stopped, strict=True)
        ]

    def _sample(self, model: GPT, prompts: Sequence[Prompt], samples: np.ndarray, is_greedy: bool) -> Samples:
        """Return this rank's replies, with the rewards that functions give them."""
        method, heartbeat = self.method, self.world.heartbeat
        if not prompts:
            return Samples([], [], np.zeros(0, bool), np.zeros((0, self.rewards.num_functions)), None)
        capacity = max(len(prompt.ids) for prompt in prompts) + method.max_new_tokens
        mean = sum(len(prompt.ids) for prompt in prompts) / len(prompts)
        slots = min(method.generate_batch_size, len(prompts))
        generator = BatchGenerator(model, slots, capacity, PROMPT_TOKENS, reuse_prefixes=mean >= LONG_PROMPT)
        settings = [
            SamplingSettings(
                method.max_new_tokens,
                0.0 if is_greedy else method.temperature,
                seed=reply_seed(self.seed, sample),
                stop_ids=self.stop_ids,
            )
            for sample in samples.tolist()
        ]
        replies = generator.run([prompt.ids for prompt in prompts], settings, heartbeat.beat)
        stopped = [reply.finish == "stop" for reply in replies]
        texts = self._texts([reply.ids for reply in replies], stopped)
        names = list(dict.fromkeys(name for prompt in prompts for name in prompt.fields))
        fields = {name: [prompt.fields.get(name) for prompt in prompts] for name in names}
        rewards = self.rewards.of_functions(Replies([prompt.prompt for prompt in prompts], texts, stopped, fields))
        ids, rows = [reply.ids for reply in replies], [prompt.ids for prompt in prompts]
        reference, values = None, None
        if self.reference is not None and not is_greedy:
            reference = reply_log_probs(
                self.reference, rows, ids, method.temperature, method.generate_batch_size, heartbeat.beat
            )
        if self.has_values and not is_greedy:
            values = reply_values(model, rows, ids, method.generate_batch_size, heartbeat.beat)
        return Samples(ids, [reply.logprobs for reply in replies], np.array(stopped), rewards, reference, values)

    def _gathered(self, own: Samples, rows: int) -> Samples:
        """Return the samples of all ranks in order. `rows` is the largest number that a rank has."""
        if self.world.size == 1:
            return own
        width = self.method.max_new_tokens
        numbers = torch.zeros(rows, width + 2, dtype=torch.int64)
        values = torch.zeros(rows, 3 * width + self.rewards.num_functions, dtype=torch.float64)
        of_tokens = [own.log_probs, own.reference, own.values]
        for row, ids in enumerate(own.ids):
            numbers[row, 0], numbers[row, 1] = len(ids), int(own.stopped[row])
            numbers[row, 2 : 2 + len(ids)] = torch.tensor(ids)
            for place, each in enumerate(of_tokens):
                if each is not None:
                    first = place * width
                    values[row, first : first + len(ids)] = torch.tensor(each[row], dtype=torch.float64)
            values[row, 3 * width :] = torch.from_numpy(own.rewards[row])
        all_numbers = self.world.all_gather(numbers).flatten(0, 1)
        all_values = self.world.all_gather(values).flatten(0, 1)
        used = all_numbers[:, 0] > 0  # every reply has a token
        lengths = all_numbers[used, 0].tolist()

        def cut(place: int) -> list[list[float]]:
            first = place * width
            return [row[first : first + n] for row, n in zip(all_values[used].tolist(), lengths, strict=True)]

        return Samples(
            ids=[row[2 : 2 + n] for row, n in zip(all_numbers[used].tolist(), lengths, strict=True)],
            log_probs=cut(0),
            stopped=all_numbers[used, 1].bool().numpy(),
            rewards=all_values[used, 3 * width :].numpy(),
            reference=None if self.reference is None else cut(1),
            values=cut(2) if self.has_values else None,
        )


def reply_log_probs(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    temperature: float,
    batch_size: int,
    beat: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Return the log-probability of each token of each reply after its prompt, in nats, at a temperature above 0."""

    def log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
        return model.token_log_probs(hidden if temperature == 1 else hidden / temperature, labels)

    return _each_token(model, prompts, replies, batch_size, beat, log_probs)


def reply_values(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    batch_size: int,
    beat: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Return the value of what stands before each token of each reply, by the model's value head."""
    return _each_token(model, prompts, replies, batch_size, beat, lambda hidden, _: model.token_values(hidden))


@torch.no_grad()
def _each_token(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    batch_size: int,
    beat: Callable[[], None],
    numbers: Callable[[Tensor, Tensor], Tensor],
) -> list[list[float]]:
    """Return what `numbers` gives the tokens of each reply, from the head's input `[B, T, D]` and labels `[B, T]`."""
    device = model.embed.weight.device
    found: list[list[float]] = []
    for first in range(0, len(prompts), batch_size):
        own = slice(first, first + batch_size)
        rows = [[*prompt, *reply] for prompt, reply in zip(prompts[own], replies[own], strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        labels = torch.full_like(ids[:, 1:], IGNORE_INDEX)
        for number, (prompt, row) in enumerate(zip(prompts[own], rows, strict=True)):
            labels[number, len(prompt) - 1 : len(row) - 1] = ids[number, len(prompt) : len(row)]
        each = numbers(model.hidden(ids[:, :-1]), labels).tolist()
        found += [
            line[len(prompt) - 1 : len(row) - 1] for line, prompt, row in zip(each, prompts[own], rows, strict=True)
        ]
        beat()
    return found

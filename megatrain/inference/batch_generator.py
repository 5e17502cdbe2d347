"""Generate many replies at once (continuous batching): requests join and leave the batch between tokens.

Sampling is in draw.py, the cache of keys and values in slot_cache.py. This file decides which tokens a step computes:
the next one of every reply, and up to `chunk` tokens of prompts. It knows no tokenizer, no text and no threads.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatrain.errors import ConfigError, DivergedError
from megatrain.inference.draw import Drawn, SamplingSettings, draw
from megatrain.inference.slot_cache import Chunk, SlotCache
from megatrain.model.gpt import GPT
from megatrain.model.sampling import check_request

SHORTEST_PREFIX = 4
"""Tokens that another prompt must share to be copied: fewer are computed faster than found."""


@dataclass(frozen=True)
class Token:
    """A drawn token of a request: its id, its log-probability in nats, and the likeliest ids with theirs, if asked.

    `finish` is None while the reply goes on. It is `stop` with one of the `stop_ids`, `length` with the last of
    `max_new_tokens`, and `error` if the model's logits were no numbers; the id then means nothing.
    """

    request: int
    id: int
    logprob: float
    finish: str | None
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Reply:
    """A whole reply: its ids, the id that stopped it included, their log-probabilities in nats, and why it ended."""

    ids: list[int]
    logprobs: list[float]
    finish: str


@dataclass(eq=False)
class _Request:
    number: int
    prompt: np.ndarray
    settings: SamplingSettings
    slot: int = -1
    num_drawn: int = 0
    last: int = 0


@dataclass(eq=False)
class _Slot:
    """A slot's content: the first `length` of `ids` have their keys and values in the cache."""

    ids: np.ndarray
    length: int = 0
    request: _Request | None = None
    used: int = 0

    def shared(self, prompt: np.ndarray) -> int:
        """Return how many tokens at the beginning of a prompt are in this slot."""
        most = min(self.length, len(prompt))
        differs = self.ids[:most] != prompt[:most]
        return int(differs.argmax()) if differs.any() else most


@dataclass
class Counts:
    """Tokens so far: of prompts computed, of prompts copied from earlier ones, and generated."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    steps: int = field(default=0)


class BatchGenerator:
    """Generates the replies to several prompts with one model, in eval mode.

    `num_slots` is how many are computed at once; more wait in order. A prompt and its reply have at most `capacity`
    tokens together. The cache takes 2 x layers x slots x capacity x key-value heads x head size numbers. A step
    computes at most `chunk` tokens of prompts, so that long prompts do not hold up replies.

    With `reuse_prefixes` a prompt that begins like an earlier one, or like one with its reply, takes the keys and
    values over. After the model's weights have changed call `forget`, or make another generator.

    A reply depends on its own request only, not on the batch, up to the rounding of sums: with other neighbours the
    logits differ in their last bits.
    """

    def __init__(
        self, model: GPT, num_slots: int, capacity: int, chunk: int = 512, reuse_prefixes: bool = True
    ) -> None:
        if min(num_slots, capacity, chunk) < 1:
            raise ConfigError(f"num_slots={num_slots}, capacity={capacity}, chunk={chunk}: expected at least 1")
        config, weight = model.config, model.embed.weight
        if config.rope_scaling == "dynamic" and capacity > config.max_seq_len:
            # beyond, the frequencies of every sequence would depend on the longest in the batch
            raise ConfigError(f"capacity={capacity}: with model.rope_scaling=dynamic use at most {config.max_seq_len}")
        self.model, self.capacity, self.chunk, self.reuse_prefixes = model, capacity, chunk, reuse_prefixes
        self.counts = Counts()
        self._cache = SlotCache(config, num_slots, capacity, weight.device, weight.dtype)
        self._slots = [_Slot(np.zeros(capacity, dtype=np.int64)) for _ in range(num_slots)]
        self._decoding: list[_Request] = []  # number i is in slot i
        self._prefilling: list[_Request] = []
        self._waiting: deque[_Request] = deque()
        self._next_number = 0

    @property
    def num_active(self) -> int:
        """Requests that have a slot."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def add(self, prompt_ids: Sequence[int], settings: SamplingSettings) -> int:
        """Take a request, and return its number.

        Raises:
            ConfigError: see `check`.
        """
        self.check(prompt_ids, settings)
        request = _Request(self._next_number, np.array(prompt_ids, dtype=np.int64), settings)
        self._next_number += 1
        self._waiting.append(request)
        return request.number

    def check(self, prompt_ids: Sequence[int], settings: SamplingSettings) -> None:
        """Raise `ConfigError` for a request that cannot be computed. Any thread may call this.

        That is an empty prompt, ids outside the vocabulary, or a prompt that is too long together with its reply.
        """
        check_request(self.model, list(prompt_ids), settings.max_new_tokens)
        needed = len(prompt_ids) + settings.max_new_tokens - 1  # the last token is not fed back
        if needed > self.capacity:
            raise ConfigError(
                f"a prompt of {len(prompt_ids)} tokens and max_new_tokens={settings.max_new_tokens} do not fit "
                f"{self.capacity} tokens; shorten one of them"
            )

    def cancel(self, number: int) -> bool:
        """Drop a request and free its slot. Return whether it was there: not finished, and not cancelled before."""
        for requests in (self._waiting, self._prefilling, self._decoding):
            found = next((request for request in requests if request.number == number), None)
            if found is None:
                continue
            if requests is self._decoding:
                self._leave(found)
            else:
                requests.remove(found)
                if found.slot >= 0:
                    self._slots[found.slot].request = None
            return True
        return False

    def forget(self) -> None:
        """Forget the prompts of earlier requests, which the model's weights no longer agree with."""
        assert self.num_active == 0, "the weights changed while replies were generated"
        for slot in self._slots:
            slot.length = 0

    def reset(self) -> None:
        """Drop all requests and what earlier ones left behind, as after a step that failed."""
        self._decoding.clear()
        self._prefilling.clear()
        self._waiting.clear()
        for number, slot in enumerate(self._slots):
            slot.length, slot.request = 0, None
            self._cache.clear(number)

    def step(self) -> list[Token]:
        """Compute the next token of every reply, and some of the prompts. Return the tokens drawn, in order of slots.

        Returns an empty list if there is nothing to do, or if only prompts were computed.
        """
        chunks = self._next_chunks()
        if not chunks and not self._decoding:
            return []
        decoding, done = list(self._decoding), self._finished_prompts(chunks)
        logits = self._logits(decoding, chunks, done)
        self.counts.steps += 1
        for request in decoding:
            self._store(request, np.array([request.last]))
        for chunk, request in zip(chunks, [self._request(chunk) for chunk in chunks], strict=True):
            self._store(request, request.prompt[chunk.start : chunk.stop])
        if logits is None:
            return []
        for request in done:
            self._begin_reply(request)
        requests = [*decoding, *done]
        drawn = draw(logits, [one.settings for one in requests], [one.num_drawn for one in requests])
        return [self._take(request, one) for request, one in zip(requests, drawn, strict=True)]

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        between: Callable[[], None] | None = None,
    ) -> list[Reply]:
        """Return the replies to all prompts, in order; `between` is called after each step.

        Raises:
            ConfigError: see `add`.
            DivergedError: the model's logits are no numbers.
        """
        each = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else settings
        numbers = [self.add(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
        found: dict[int, list[Token]] = {number: [] for number in numbers}
        while self.num_active or self.num_waiting:
            for token in self.step():
                if token.finish == "error":
                    raise DivergedError("the model's logits are NaN or infinite, so no token can be drawn")
                found[token.request].append(token)
            if between is not None:
                between()
        replies = []
        for tokens in found.values():
            finish = tokens[-1].finish
            assert finish is not None
            replies.append(Reply([token.id for token in tokens], [token.logprob for token in tokens], finish))
        return replies

    def _next_chunks(self) -> list[Chunk]:
        """Choose the tokens of prompts that the next step computes, and give slots to waiting requests."""
        left, chunks = self.chunk, []
        for request in self._prefilling:
            if left > 0:
                chunks.append(self._chunk_of(request, left))
                left -= chunks[-1].stop - chunks[-1].start
        postponed: list[_Request] = []
        while self._waiting and left > 0 and self.num_active < len(self._slots):
            request = self._waiting.popleft()
            if self.reuse_prefixes and self._is_worth_a_step(request, chunks):
                postponed.append(request)
                continue
            self._give_slot(request)
            chunks.append(self._chunk_of(request, left))
            left -= chunks[-1].stop - chunks[-1].start
        self._waiting.extendleft(reversed(postponed))
        return chunks

    def _chunk_of(self, request: _Request, most: int) -> Chunk:
        start = self._slots[request.slot].length
        return Chunk(request.slot, start, min(start + most, len(request.prompt)))

    def _is_worth_a_step(self, request: _Request, chunks: list[Chunk]) -> bool:
        """Return whether a chunk of this step computes more of the request's prompt than is in any slot yet."""
        known = max(slot.shared(request.prompt) for slot in self._slots)
        usable = len(request.prompt) - 1  # the last token is computed in any case, for its logits
        for chunk in chunks:
            other = self._request(chunk).prompt[: chunk.stop]
            most = min(len(other), usable)
            differs = other[:most] != request.prompt[:most]
            shared = int(differs.argmax()) if differs.any() else most
            if shared >= SHORTEST_PREFIX and shared > known:
                return True
        return False

    def _give_slot(self, request: _Request) -> None:
        """Put a request into a free slot, with as much of its prompt as another slot has."""
        usable = request.prompt[:-1]
        shared = [slot.shared(usable) if self.reuse_prefixes else 0 for slot in self._slots]
        source = max(range(len(shared)), key=shared.__getitem__)
        length = shared[source] if shared[source] >= SHORTEST_PREFIX else 0
        free = [number for number, slot in enumerate(self._slots) if slot.request is None]
        # A slot is taken over as it is where that loses little of it. Otherwise the one unused for longest is.
        if length and source in free and 2 * length >= self._slots[source].length:
            target = source
        else:
            target = min(free, key=lambda number: (self._slots[number].length > 0, self._slots[number].used))
            if length and target != source:
                self._cache.copy(source, target, length)
        slot = self._slots[target]
        slot.ids[:length] = usable[:length]
        slot.length, slot.request, request.slot = length, request, target
        self._prefilling.append(request)
        self.counts.reused_tokens += length

    def _request(self, chunk: Chunk) -> _Request:
        request = self._slots[chunk.slot].request
        assert request is not None
        return request

    def _finished_prompts(self, chunks: list[Chunk]) -> list[_Request]:
        """Return the requests whose prompts end with this step's chunks."""
        requests = [(self._request(chunk), chunk) for chunk in chunks]
        return [request for request, chunk in requests if chunk.stop == len(request.prompt)]

    def _logits(self, decoding: list[_Request], chunks: list[Chunk], done: list[_Request]) -> Tensor | None:
        """Compute a step; return the fp32 logits `[N, V]` that follow the replies and the finished prompts, if any."""
        if self.model.training:
            self.model.eval()
        tokens = [np.array([request.last for request in decoding], dtype=np.int64)]
        ends, length = list(range(len(decoding))), len(decoding)
        for chunk in chunks:
            request = self._request(chunk)
            tokens.append(request.prompt[chunk.start : chunk.stop])
            length += chunk.stop - chunk.start
            if request in done:
                ends.append(length - 1)
        self.counts.prompt_tokens += length - len(decoding)
        device = self._cache.storage.device
        with torch.no_grad():
            positions = self._cache.plan([self._slots[request.slot].length for request in decoding], chunks)
            ids = torch.from_numpy(np.concatenate(tokens)).to(device)
            hidden = self.model.hidden(ids[None], positions=positions, cache=self._cache)[0]
            if not ends:
                return None
            if len(ends) < length:
                hidden = hidden[torch.tensor(ends, device=device)]
            logits: Tensor = self.model.head(hidden[None])[0].float()
        return logits

    def _store(self, request: _Request, ids: np.ndarray) -> None:
        """Note that a request's slot has the keys and values of further tokens."""
        slot = self._slots[request.slot]
        slot.ids[slot.length : slot.length + len(ids)] = ids
        slot.length += len(ids)
        slot.used = self.counts.steps

    def _take(self, request: _Request, drawn: Drawn) -> Token:
        """Note the token that was drawn for a request, which leaves its slot if that is the last one."""
        request.last = drawn.token
        request.num_drawn += 1
        self.counts.generated_tokens += 1
        finish = None
        if not math.isfinite(drawn.logprob):
            finish = "error"
        elif drawn.token in request.settings.stop_ids:
            finish = "stop"
        elif request.num_drawn == request.settings.max_new_tokens:
            finish = "length"
        if finish is not None:
            self._leave(request)
            if finish == "error":
                self._slots[request.slot].length = 0
                self._cache.clear(request.slot)
        return Token(request.number, drawn.token, drawn.logprob, finish, drawn.top)

    def _begin_reply(self, request: _Request) -> None:
        """Move a request whose prompt is computed behind those that are being generated."""
        self._prefilling.remove(request)
        self._exchange(request.slot, len(self._decoding))
        self._decoding.append(request)

    def _leave(self, request: _Request) -> None:
        """Free the slot of a request that is being generated; the last of those takes its place."""
        last = self._decoding[-1]
        self._exchange(request.slot, last.slot)
        self._decoding[last.slot] = last
        self._decoding.pop()
        self._slots[request.slot].request = None

    def _exchange(self, one: int, other: int) -> None:
        """Exchange two slots with all they hold."""
        if one == other:
            return
        slots = self._slots
        self._cache.swap(one, other, max(slots[one].length, slots[other].length))
        slots[one], slots[other] = slots[other], slots[one]
        for number in (one, other):
            request = slots[number].request
            if request is not None:
                request.slot = number

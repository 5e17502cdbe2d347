"""What the serving API does, without HTTP: a request becomes a job, within the limits of server and client."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatrain.config import ServeGroup
from megatrain.data.chat.conversation import Message
from megatrain.data.chat.template import ChatTemplate
from megatrain.data.corpus.normalise import normalise
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError
from megatrain.inference.api_errors import ApiError
from megatrain.inference.api_requests import ChatRequest, CompletionRequest, check_fields
from megatrain.inference.batch_generator import BatchGenerator
from megatrain.inference.check_process import ContentChecks
from megatrain.inference.draw import SamplingSettings
from megatrain.inference.generation_thread import GenerationThread
from megatrain.inference.job import Job, Prompt
from megatrain.inference.memory import context_of
from megatrain.inference.prompt_encoder import PromptEncoder
from megatrain.inference.rate_limits import RateLimit
from megatrain.inference.serving_metrics import ServingMetrics
from megatrain.model.gpt import GPT

COMPLETION_TOKENS = 16
"""Tokens of a completion whose request gives no number, as in OpenAI's API."""


@dataclass(frozen=True)
class ServedModel:
    """A model with what text needs: its tokenizer, its chat template if it has one, and the ids that end a text."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    template: ChatTemplate | None
    end_tokens: frozenset[int]
    created: int = field(default_factory=lambda: int(time.time()))


class Service:
    """One server process's model, limits and counts. Made in its event loop; `stop` ends its thread."""

    def __init__(self, served: ServedModel, config: ServeGroup, keys: Sequence[str], checks: ContentChecks) -> None:
        """Without `keys` anybody may ask."""
        self.served, self.config, self.keys, self.checks = served, config, list(keys), checks
        self.context = context_of(config, served.model.config)
        self.is_draining = False
        generator = BatchGenerator(
            served.model, config.max_concurrent, self.context, config.prompt_chunk, config.reuse_prefixes
        )
        self.thread = GenerationThread(generator, asyncio.get_running_loop(), config.step_timeout_s)
        self.metrics = ServingMetrics(self.thread, config.max_concurrent)
        longest = min(self.context, config.max_prompt_tokens or self.context)
        self._prompts = PromptEncoder(served.tokenizer, longest)
        self._requests = RateLimit(config.requests_per_minute) if config.requests_per_minute else None
        self._tokens = RateLimit(config.tokens_per_minute) if config.tokens_per_minute else None

    def stop(self) -> None:
        """End the threads."""
        self._prompts.close()
        self.thread.stop()

    async def chat(self, request: ChatRequest) -> Job:
        """Begin a chat's replies. Raises `ApiError`."""
        self._check(request)
        if self.served.template is None:
            raise ApiError(
                400, f"{self.served.name} has no chat template; use /v1/completions", param="model", code="no_template"
            )
        roles = {"developer": "system"}
        messages: list[Message] = [
            {
                "role": roles.get(message.role, message.role),
                "content": normalise(message.text()),
            }
            for message in request.messages
        ]
        text, template = "\n".join(message["content"] for message in messages), self.served.template
        self._prompts.check(len(text))
        await self._check_prompt(text)
        try:
            ids = await self._prompts.encode(len(text), lambda: template.encode(messages, asks=True).ids)
        except ConfigError as error:
            raise ApiError(400, f"messages: {error}", param="messages", code="invalid_messages") from None
        most = request.max_completion_tokens or request.max_tokens or self.config.max_new_tokens
        stop_ids = frozenset([*self.served.template.ends(), *self.served.end_tokens])
        is_given = request.max_completion_tokens is not None or request.max_tokens is not None
        top = (request.top_logprobs or 0) if request.logprobs else 0
        return self._job(request, [Prompt(ids)], most, is_given, stop_ids, top)

    async def complete(self, request: CompletionRequest) -> Job:
        """Begin the continuations of one or several prompts. Raises `ApiError`."""
        self._check(request)
        prompts = [await self._prompt(one) for one in request.prompts()]
        most = request.max_tokens or COMPLETION_TOKENS
        is_given = request.max_tokens is not None
        return self._job(request, prompts, most, is_given, self.served.end_tokens, request.logprobs or 0)

    def count(self, job: Job, client: str) -> None:
        """Charge a finished job to its client."""
        if self._tokens is not None:
            self._tokens.take(client, job.prompt_tokens + job.completion_tokens)

    def admit(self, client: str) -> None:
        """Count a request of which only the headers are known. Raises `ApiError` for one that is not taken now."""
        if self.is_draining:
            raise ApiError(503, "the server is about to end", code="draining", headers={"retry-after": "1"})
        if self.thread.hangs:
            raise ApiError(503, "the model does not answer", code="failing", headers={"retry-after": "10"})
        for limit, what in ((self._requests, "requests"), (self._tokens, "tokens")):
            if limit is not None and (wait := limit.wait(client)) > 0:
                raise _too_many(f"more than {limit.per_minute} {what} per minute", wait)
        if self._requests is not None:
            self._requests.take(client)

    def _check(self, request: ChatRequest | CompletionRequest) -> None:
        """Raise `ApiError` for a request that this server never takes."""
        check_fields(request)
        if request.model != self.served.name:
            message = f"there is no model {request.model[:100]!r} here; use {self.served.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _prompt(self, given: str | list[int]) -> Prompt:
        tokenizer = self.served.tokenizer
        if isinstance(given, list):
            self._prompts.check_ids(len(given))
            outside = [token for token in given if token >= tokenizer.vocab_size]
            if outside:
                raise ApiError(
                    400,
                    f"prompt: token id {outside[0]} is outside the vocabulary of {tokenizer.vocab_size}",
                    param="prompt",
                    code="invalid_value",
                )
            await self._check_prompt(tokenizer.decode(given))
            return Prompt(given, given)
        text = normalise(given)
        self._prompts.check(len(text))
        await self._check_prompt(text)
        ids = await self._prompts.encode(len(text), lambda: [*tokenizer.start(), *tokenizer.encode(text)])
        ids = ids or [tokenizer.end_of_document]
        return Prompt(ids, ids if text else ())

    async def _check_prompt(self, text: str) -> None:
        if not self.checks.of_prompts:
            return
        why = await self.checks.refusal("prompt", text, True, self.config.timeout_s)
        if why is not None:
            raise ApiError(400, f"the prompt is refused: {why}", code="content_filter")

    def _job(
        self,
        request: ChatRequest | CompletionRequest,
        prompts: list[Prompt],
        most: int,
        is_given: bool,
        stop_ids: frozenset[int],
        top: int,
    ) -> Job:
        longest = max(len(prompt.ids) for prompt in prompts)
        most = self._new_tokens(longest, most, is_given)
        self._check_room(len(prompts) * (request.n or 1))
        seed = secrets.randbits(63) if request.seed is None else request.seed
        settings = [
            SamplingSettings(
                most,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_k=request.top_k or 0,
                top_p=request.top_p or 1.0,
                seed=seed + number,
                stop_ids=stop_ids,
                top_logprobs=top,
            )
            for number in range(len(prompts) * (request.n or 1))
        ]
        for prompt in prompts:
            self.thread.generator.check(prompt.ids, settings[0])
        return Job(
            self.thread,
            self.served.tokenizer,
            prompts,
            settings,
            request.stops(),
            self.checks,
            self.config.timeout_s,
        )

    def _new_tokens(self, prompt: int, most: int, is_given: bool) -> int:
        """Return how many tokens a reply may have. Raises `ApiError` if prompt or reply are too long."""
        config = self.config
        if is_given and most > config.max_new_tokens:
            message = f"max_tokens={most}: this server writes at most {config.max_new_tokens} tokens"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        most = min(most, config.max_new_tokens)
        if config.max_prompt_tokens is not None and prompt > config.max_prompt_tokens:
            message = f"the prompt has {prompt} tokens; this server takes at most {config.max_prompt_tokens}"
            raise ApiError(400, message, code="context_length_exceeded")
        left = self.context - prompt
        if left < (most if is_given else 1):
            asked = f" and max_tokens={most}" if is_given and left >= 1 else ""
            message = f"the prompt of {prompt} tokens{asked} exceeds the context of {self.context} tokens"
            raise ApiError(400, message, code="context_length_exceeded")
        return min(most, left)

    def _check_room(self, replies: int) -> None:
        """Raise `ApiError` if so many replies do not fit the queue, now or ever."""
        config = self.config
        room = config.max_concurrent + config.max_queue
        if replies > room:
            raise ApiError(400, f"{replies} replies at once; this server takes {room}", param="n", code="invalid_value")
        if self.thread.num_open + replies > room:
            raise _too_many("too many requests are waiting", self.thread.num_open / config.max_concurrent)


def _too_many(why: str, wait_s: float) -> ApiError:
    seconds = max(1, math.ceil(wait_s))
    headers = {"retry-after": str(seconds)}
    return ApiError(429, f"{why}; try again in {seconds} s", code="rate_limit_exceeded", headers=headers)

"""One HTTP request's replies: submitted, decoded, checked, counted, and cancelled when nobody waits for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from megatrain.data.tokenizer import Tokenizer
from megatrain.inference.api_errors import ApiError
from megatrain.inference.batch_generator import Token
from megatrain.inference.check_process import ContentChecks
from megatrain.inference.draw import SamplingSettings
from megatrain.inference.generation_thread import Event, GenerationThread
from megatrain.inference.reply_text import ReplyText, TokenText

_TIMEOUT = -1
"""The number of the event that ends a job whose time is over, and ..."""
_PING = -2
"""... of that after which a job says that it still waits."""

PING_S = 15.0
"""Seconds between two such events."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's ids, and those of them that the text of its reply continues."""

    ids: list[int]
    before: Sequence[int] = ()


@dataclass(frozen=True)
class Piece:
    """More of the reply `index`: its text, the tokens in it, and why the reply ends with it, if it does."""

    index: int
    text: str
    tokens: list[TokenText]
    finish: str | None


@dataclass
class Times:
    """Monotonic times of a job, in seconds."""

    start: float = field(default_factory=time.monotonic)
    first_token: float | None = None


class Job:
    """The replies to the prompts of a request, `n` to each in order. Call `close` in any case."""

    def __init__(
        self,
        thread: GenerationThread,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        settings: Sequence[SamplingSettings],
        stops: Sequence[str],
        checks: ContentChecks,
        timeout_s: float,
    ) -> None:
        """`settings` has an element for each reply, prompt by prompt."""
        self.times = Times()
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self._thread, self._timeout_s = thread, timeout_s
        self._checks = checks if checks.of_replies else None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        each = len(settings) // len(prompts)
        of = [prompt for prompt in prompts for _ in range(each)]
        hold_back = checks.hold_back if checks.of_replies else 0
        self.replies = [ReplyText(tokenizer, stops, prompt.before, hold_back) for prompt in of]
        # among the events, since a wait with a limit for each token costs more than the token at toy size
        loop = asyncio.get_running_loop()
        self._timers = [
            loop.call_later(timeout_s, self._events.put_nowait, Event(_TIMEOUT, None)),
            loop.call_later(PING_S, self._ping, loop),
        ]
        self._tickets = [
            thread.submit(prompt.ids, one, index, self._events)
            for index, (prompt, one) in enumerate(zip(of, settings, strict=True))
        ]

    @property
    def completion_tokens(self) -> int:
        """Tokens drawn so far."""
        return sum(reply.num_tokens for reply in self.replies)

    async def pieces(self) -> AsyncIterator[Piece | None]:
        """Yield the replies as they are written; and None now and then, though nothing may have been written.

        Raises:
            ApiError: the time is over (504), the model cannot compute the reply or a check fails (500).
        """
        while any(reply.finish is None for reply in self.replies):
            event = await self._events.get()
            if event.reply == _TIMEOUT:
                raise self._timed_out()
            if event.reply == _PING:
                yield None
            elif not self.replies[event.reply].is_finished:
                yield await self._take(event.reply, event.token)

    async def _take(self, index: int, token: Token | None) -> Piece:
        reply = self.replies[index]
        if token is None or token.finish == "error":
            raise ApiError(500, "the model failed to compute the reply", code="generation_failed")
        if self.times.first_token is None:
            self.times.first_token = time.monotonic()
        text, entry = reply.push(token)
        if self._checks is not None and await self._is_refused(self._checks, reply):
            text, entry = "", None
            reply.cut()
        if reply.finish is not None and token.finish is None:
            self._thread.cancel(self._tickets[index])
        return Piece(index, text, [] if entry is None else [entry], reply.finish)

    async def _is_refused(self, checks: ContentChecks, reply: ReplyText) -> bool:
        left = self.times.start + self._timeout_s - time.monotonic()
        return await checks.refusal("reply", reply.seen, reply.finish is not None, left) is not None

    def _ping(self, loop: asyncio.AbstractEventLoop) -> None:
        self._events.put_nowait(Event(_PING, None))
        self._timers[1] = loop.call_later(PING_S, self._ping, loop)

    def _timed_out(self) -> ApiError:
        return ApiError(504, f"the reply is not finished within {self._timeout_s:g} seconds", code="timeout")

    def close(self) -> None:
        """Cancel what is not finished."""
        for timer in self._timers:
            timer.cancel()
        for ticket in self._tickets:
            self._thread.cancel(ticket)

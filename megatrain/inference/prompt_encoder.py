"""Encode prompts without holding the server up: those that are certainly too long are refused, long ones wait apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from megatrain.data.tokenizer import SEGMENT, Tokenizer
from megatrain.inference.api_errors import ApiError

_NUM_THREADS = 2


class PromptEncoder:
    """Encodes prompts of at most `max_tokens` tokens."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        # a tokenizer may drop the space before a token's text
        longest = max(len(tokenizer.decode([token])) for token in range(tokenizer.vocab_size)) + 1
        self.max_characters = max_tokens * longest
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "encode")

    def close(self) -> None:
        """End the threads after what they encode."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check(self, characters: int) -> None:
        """Raise `ApiError` for a text that is too long, however few tokens it has for its length."""
        if characters > self.max_characters:
            raise ApiError(
                400,
                f"the prompt of {characters} characters exceeds the {self.max_tokens} tokens that a prompt may have",
                code="context_length_exceeded",
            )

    def check_ids(self, number: int) -> None:
        """Raise `ApiError` for too many ids."""
        if number > self.max_tokens:
            raise ApiError(
                400,
                f"the prompt of {number} tokens exceeds the {self.max_tokens} that a prompt may have",
                code="context_length_exceeded",
            )

    async def encode(self, characters: int, work: Callable[[], list[int]]) -> list[int]:
        """Return what `work` returns, which encodes so many characters: here if they are few, or else in a thread."""
        if characters <= SEGMENT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

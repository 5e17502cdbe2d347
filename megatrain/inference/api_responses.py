"""The replies of the serving API as OpenAI's clients read them: whole, and as events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from megatrain.inference.job import Job, Piece
from megatrain.inference.reply_text import TokenText


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(BaseModel):
    """The body of a chat completion."""

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: Usage


class CompletionReply(ChatReply):
    """The body of a completion."""


class ModelObject(BaseModel):
    """A model that can be asked."""

    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The body of `/v1/models`."""

    object: str
    data: list[ModelObject]


@dataclass
class Writer:
    """Writes the replies of one request. `logprobs` asks for log-probabilities."""

    model: str
    is_chat: bool
    logprobs: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, job: Job, pieces: list[Piece]) -> dict[str, Any]:
        """Return the body of all replies, made of their pieces."""
        choices = []
        for index in range(len(job.replies)):
            own = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in own)
            if self.is_chat:
                choice: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
            else:
                choice = {"text": text}
            tokens = [token for piece in own for token in piece.tokens]
            logprobs = self._logprobs(tokens) if self.logprobs else None
            choices.append({"index": index, **choice, "logprobs": logprobs, "finish_reason": own[-1].finish})
        return {**self._head(False), "choices": choices, "usage": usage(job)}

    def first(self, index: int, with_usage: bool) -> str:
        """Return the event that begins a reply of a chat."""
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, [], None, with_usage)

    def piece(self, piece: Piece, with_usage: bool) -> str:
        """Return the events of a piece."""
        if not self.is_chat:
            return self._event(piece.index, {"text": piece.text}, piece.tokens, piece.finish, with_usage)
        events = ""
        if piece.text or piece.tokens:
            events = self._event(piece.index, {"delta": {"content": piece.text}}, piece.tokens, None, with_usage)
        if piece.finish is not None:
            events += self._event(piece.index, {"delta": {}}, [], piece.finish, with_usage)
        return events

    def usage(self, job: Job) -> str:
        """Return the event with the usage, which ends a stream that asked for it."""
        return event({**self._head(True), "choices": [], "usage": usage(job)})

    def _event(
        self, index: int, content: dict[str, Any], tokens: list[TokenText], finish: str | None, with_usage: bool
    ) -> str:
        logprobs = self._logprobs(tokens) if self.logprobs and tokens else None
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        return event({**self._head(True), "choices": [choice], **({"usage": None} if with_usage else {})})

    def _head(self, is_event: bool) -> dict[str, Any]:
        kind = ("chat.completion" + ".chunk" * is_event) if self.is_chat else "text_completion"
        prefix = "chatcmpl-" if self.is_chat else "cmpl-"
        return {"id": prefix + self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: list[TokenText]) -> dict[str, Any]:
        if self.is_chat:
            content = [
                {
                    **_token(token.text, token.logprob),
                    "top_logprobs": [_token(text, logprob) for text, logprob in token.top],
                }
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text: finite(logprob) for text, logprob in reversed(token.top)} for token in tokens],
            "text_offset": [token.start for token in tokens],
        }


def usage(job: Job) -> dict[str, int]:
    """Return the tokens of a job."""
    prompt, completion = job.prompt_tokens, job.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(data: Any) -> str:
    """Return JSON values as a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can write: -9999 for that of an impossible token, as OpenAI's API does."""
    return max(logprob, -9999.0)


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}

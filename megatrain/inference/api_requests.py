"""The requests that the serving API takes: OpenAI's chat completions and completions, as far as a model here can.

A field without an effect here is refused unless its value asks for nothing, so that no client believes otherwise.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatrain.inference.api_errors import ApiError, printable

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's API that are not supported, with the values, besides null, that ask for nothing."""

_IGNORED = ("metadata", "prompt_cache_key", "safety_identifier", "user")
"""Fields that change nothing in a reply."""

MAX_CHARACTERS = 2**20
"""Characters of a text, as in OpenAI's API. How many a model's context allows, the service says."""
MAX_IDS = 2**20
"""Token ids of a prompt."""
MAX_FIELDS = 64
"""Fields of an object that the schema does not name."""

_MAX_SHORT, _MAX_PAIRS = 512, 16
"""Characters of a name or an identifier, and pairs of `metadata`."""

# A list ends at its first error: a million of them would hold the server up for seconds.
_Token = Annotated[int, Field(ge=0, lt=2**31)]
_Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Count = Annotated[int, Field(ge=1, lt=2**31)]
_Ids = Annotated[list[_Token], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]


def _needs(name: str, values: list[Any], other: str) -> dict[str, Any]:
    """Return the JSON schema which says that `name` has one of `values`, unless `other` is true."""
    given = {"properties": {other: {"const": True}}, "required": [other]}
    return {"anyOf": [given, {"properties": {name: {"enum": values}}}]}


_STREAM_RULE = _needs("stream_options", [None], "stream")
_LOGPROBS_RULE = _needs("top_logprobs", [None, 0], "logprobs")


def _schema(*rules: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"additionalProperties": False, "allOf": list(rules)})


class _Model(BaseModel):
    # the schema names no other fields; here they are kept, so that check_fields can say what is wrong with each
    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": False})


class TextPart(_Model):
    """A part of a message's content."""

    type: Literal["text"]
    text: _Text


class ChatMessage(_Model):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)]

    def text(self) -> str:
        """Return the content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Model):
    """What a stream holds besides the reply."""

    include_usage: bool = False


class _Request(_Model):
    model: str = Field(max_length=_MAX_SHORT)
    max_tokens: _Count | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        """Return the texts that end a reply."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatRequest(_Request):
    """The body of `/v1/chat/completions`."""

    model_config = _schema(_STREAM_RULE, _LOGPROBS_RULE)

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096, fail_fast=True)
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionRequest(_Request):
    """The body of `/v1/completions`: text to continue, token ids, or a list of either."""

    model_config = _schema(_STREAM_RULE)

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=128, fail_fast=True)]
        | _Ids
        | Annotated[list[_Ids], Field(min_length=1, max_length=128, fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts: list[str | list[int]] = [one for one in self.prompt if not isinstance(one, int)]
        return texts or [[token for token in self.prompt if isinstance(token, int)]]


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every refused request."""

    error: ErrorObject


def check_fields(request: ChatRequest | CompletionRequest) -> None:
    """Raise `ApiError` for a field that would have no effect, or that nobody knows."""
    parts: list[tuple[str, _Model]] = [("", request)]
    if isinstance(request, ChatRequest):
        parts += [(f"messages.{number}.", message) for number, message in enumerate(request.messages)]
    for place, part in parts:
        if len(part.model_extra or {}) > MAX_FIELDS:
            shown = place.rstrip(".") or "the body"
            raise ApiError(400, f"{shown} has more than {MAX_FIELDS} fields that have no effect", code="invalid_value")
        for name, value in (part.model_extra or {}).items():
            _check_field(request, place, name, value)
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs=true", param="top_logprobs", code="invalid_value")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only with stream=true", param="stream_options", code="invalid_value")


def _check_field(request: _Request, place: str, name: str, value: Any) -> None:
    if value is None:
        return
    shown = printable(f"{place}{name}")[:200]
    if name in (("name",) if place else _IGNORED):
        if not _is_short(value):
            limits = f"a text of at most {_MAX_SHORT} characters, or an object of at most {_MAX_PAIRS} such"
            raise ApiError(400, f"{shown}: expected {limits}", param=shown, code="invalid_value")
        return
    if place:
        if value in ([], {}, ""):
            return
        raise ApiError(400, f"{shown}: not supported; a message is a role and a text", param=shown, code="unsupported")
    if name in _NEUTRAL:
        if any(type(value) in (type(neutral), float) and value == neutral for neutral in _NEUTRAL[name]):
            return
        raise ApiError(400, f"{shown}: not supported by this server", param=shown, code="unsupported_parameter")
    known = [*type(request).model_fields, *_NEUTRAL, *_IGNORED]
    near = get_close_matches(name[:100], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ApiError(400, f"{shown}: unknown field{hint}", param=shown, code="unknown_parameter")


def _is_short(value: Any) -> bool:
    """Return whether a value that changes nothing is as small as OpenAI's API wants it."""
    if isinstance(value, dict):
        return len(value) <= _MAX_PAIRS and all(
            isinstance(one, str) and len(one) <= _MAX_SHORT for one in value.values()
        )
    return isinstance(value, str) and len(value) <= _MAX_SHORT

"""Lay out conversations by a tokenizer's chat template (Jinja), and tell which tokens are the assistant's.

The ids are those of transformers' `apply_chat_template`, with one difference on purpose: control tokens that a message
spells stay text, so that no message can end a turn or begin another.
"""

from __future__ import annotations

import datetime
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatrain.data.chat.conversation import ROLES, Message
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode: they enclose what `{% generation %}` marks, and ..."""
_APART = "\ufdd2"
"""... stand within names of control tokens that a message spells, until the template has been filled in."""
_RESERVED = re.compile(f"[\0{_OPEN}{_CLOSE}{_APART}]")
"""Characters that messages lose: those above, and that by which tokenizers mark names of control tokens."""

_FEW = 8
"""Replies that are found one by one, which takes a time that grows with the square of their number."""

PREPARED_ON = datetime.datetime(2024, 7, 26)
"""The date that templates are told which ask for it, when a dataset is prepared: its bytes must not depend on the day.

It is the one that Llama 3.1's template has for want of another.
"""

SHORT_TALK: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
"""A conversation that every template can lay out."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. `spans` are the characters `[start, stop)` that the assistant writes.

    `controls` are those of the names of control tokens, in order.
    """

    text: str
    spans: list[tuple[int, int]]
    controls: list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each whether the assistant writes it: whether it counts in the loss."""

    ids: list[int]
    counts: list[bool]


class ChatTemplate:
    """A chat template with the tokenizer that it belongs to."""

    def __init__(
        self, tokenizer: Tokenizer, template: str | None = None, date: datetime.datetime | None = None
    ) -> None:
        """Take `template`, or else the tokenizer's own. Raises `ConfigError` if there is none, or it is no Jinja.

        `date` is what the template's `strftime_now` tells; None means now.
        """
        source = template or tokenizer.chat_template()
        if source is None:
            raise ConfigError(
                "the tokenizer has no chat template; give one whose markers are control tokens of it as "
                "data.chat_template (a Jinja file, chatml, llama3 or minimal), or begin with a base model whose data "
                "were prepared with tokenizer.chat_template=chatml"
            )
        self.tokenizer, self.source = tokenizer, source
        names = sorted(tokenizer.control_names(), key=len, reverse=True)  # of two that begin alike the longer one
        self._control = re.compile("|".join(map(re.escape, names))) if names else None
        environment = _environment(date)
        try:
            self._marks_replies = any(map(_Generation.made, environment.parse(source).find_all(nodes.CallBlock)))
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the chat template is not valid Jinja ({error})") from error

    def encode(self, messages: Sequence[Message], asks: bool = False, given: int = 0) -> Encoded:
        """Return the ids of a conversation; with `asks`, the beginning of the assistant's next message too.

        The first `given` replies do not count in the loss: they belong to the prompt. Raises `ConfigError` if the
        template refuses the messages, or does not say which part is the assistant's.
        """
        rendered = self.render(messages, asks)
        parts: list[str | int] = []
        starts: list[int] = []
        at = 0
        for start, stop in [*rendered.controls, (len(rendered.text), len(rendered.text))]:
            if start > at:
                parts.append(rendered.text[at:start])
                starts.append(at)
            if stop > start:
                token = self.tokenizer.control_token(rendered.text[start:stop])
                assert token is not None
                parts.append(token)
                starts.append(start)
            at = stop
        ids, places = self.tokenizer.encode_marked(parts)
        counts = []
        spans = sorted(rendered.spans)[given:]
        begins, ends = [start for start, _ in spans], list(accumulate((stop for _, stop in spans), max))
        for part, first, last in places:
            first, last = starts[part] + first, starts[part] + last
            before = bisect_left(begins, last)  # the spans that begin before the token ends
            counts.append(before > 0 and ends[before - 1] > first)
        return Encoded(ids, counts)

    def ends(self) -> list[int]:
        """Return the control tokens that end a reply: the one that the template writes, and the end of a document."""
        encoded = self.encode(SHORT_TALK)
        counted = [token for token, counts in zip(encoded.ids, encoded.counts, strict=True) if counts]
        control = {self.tokenizer.control_token(name) for name in self.tokenizer.control_names()}
        last = [token for token in counted if token in control][-1:]  # a template may count a newline after it
        return [*last, self.tokenizer.end_of_document]

    @property
    def asks_for_date(self) -> bool:
        """Whether the text depends on the date."""
        return "strftime_now" in self.source

    def render(self, messages: Sequence[Message], asks: bool = False) -> Rendered:
        """Return a conversation as text, with the spans that the assistant writes. Raises as `encode`."""
        text, controls, spans = self._fill(messages, asks)
        if not self._marks_replies:
            spans = self._replies(messages, text)
        return Rendered(text, spans, controls)

    def prompt(self, messages: Sequence[Message], continues: bool = False) -> str:
        """Return the text that asks for the assistant's next message; with `continues`, for the rest of the last one.

        `encode_prompt` tells the template's control tokens in it from those that messages spell, also in a text that
        something was appended to. Raises `ConfigError` if the template refuses the messages.
        """
        asked = messages[:-1] if continues else messages
        text = re.sub(f"[{_OPEN}{_CLOSE}]", "", self._filled(asked, asks=True))
        return text + self.kept_apart(messages[-1]["content"]) if continues else text

    def kept_apart(self, text: str) -> str:
        """Return a text in which names of control tokens stay text where `encode_prompt` reads it."""
        return self._without_controls(_RESERVED.sub("", text))

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of what `prompt` returned, with what was appended to it."""
        parts: list[str | int] = []
        at = 0
        for match in self._control.finditer(text) if self._control else ():
            token = self.tokenizer.control_token(match[0])
            assert token is not None
            parts += [text[at : match.start()].replace(_APART, ""), token]
            at = match.end()
        parts.append(text[at:].replace(_APART, ""))
        ids, _ = self.tokenizer.encode_marked([part for part in parts if part != ""])
        return ids

    def left_out(self, messages: Sequence[Message], asks: bool = False) -> list[int]:
        """Return the numbers, from 0, of the messages whose content is not in the text as a whole. Raises as `encode`.

        A template may strip a content; some leave out system messages, or what an earlier reply was thought over with.
        """
        marked = self._filled(messages, asks, encloses=ROLES)
        whole = [f"{_OPEN}{self.kept_apart(message['content'])}{_CLOSE}" for message in messages]
        return [number for number, content in enumerate(whole) if marked.count(content) < whole.count(content)]

    def _filled(self, messages: Sequence[Message], asks: bool, encloses: Sequence[str] = ()) -> str:
        """Return the text with its marks, in which names of control tokens that messages spell are kept apart.

        The contents of messages of the roles `encloses` have the marks of `{% generation %}`.
        """
        safe = []
        for message in messages:
            content = self.kept_apart(message["content"])
            if message["role"] in encloses:
                content = f"{_OPEN}{content}{_CLOSE}"
            safe.append({**message, "content": content})
        named = {name: token for name, token in self.tokenizer.named_tokens().items() if token}
        try:
            filled: str = self._template.render(
                messages=safe, add_generation_prompt=asks, tools=None, documents=None, **named
            )
        except _RefusedError as error:
            raise ConfigError(f"the chat template refuses the messages: {error}") from error
        except Exception as error:  # whatever the template's code raises
            raise ConfigError(f"the chat template cannot be filled in ({type(error).__name__}: {error})") from error
        return filled

    def _fill(
        self, messages: Sequence[Message], asks: bool, encloses: Sequence[str] = ()
    ) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """Return the text, where control tokens are in it, and what `{% generation %}` encloses.

        For templates without that tag the last may be the contents of messages of the roles `encloses`.
        """
        marked = self._filled(messages, asks, encloses)
        spans: list[tuple[int, int]] = []
        text, opened = "", 0
        for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
            if piece == _OPEN:
                opened = len(text)
            elif piece == _CLOSE:
                spans.append((opened, len(text)))
            else:
                text += piece
        return self._restored(text, spans)

    def _restored(
        self, text: str, spans: list[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """Find the control tokens, then take out what kept the messages' own spellings of them apart."""
        found = [match.span() for match in self._control.finditer(text)] if self._control else []
        marks = [match.start() for match in re.finditer(_APART, text)]
        if not marks:
            return text, found, spans

        def moved(at: int) -> int:
            return at - bisect_left(marks, at)

        def all_moved(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
            return [(moved(start), moved(stop)) for start, stop in pairs]

        return text.replace(_APART, ""), all_moved(found), all_moved(spans)

    def _without_controls(self, content: str) -> str:
        if self._control is None:
            return content
        return self._control.sub(lambda match: f"{match[0][0]}{_APART}{match[0][1:]}", content)

    def _replies(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Return the assistant's spans of a template that does not mark them."""
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(numbers) > _FEW:
            with suppress(ConfigError):  # finding them one by one says what is wrong, if anything is
                if found := self._enclosed_replies(messages, text, numbers):
                    return found
        return [self._reply(messages, number, text) for number in numbers]

    def _enclosed_replies(
        self, messages: Sequence[Message], text: str, numbers: Sequence[int]
    ) -> list[tuple[int, int]] | None:
        """Return the spans of many replies: what encloses the first one's content must enclose all others' too.

        The template is filled in once with marks around the contents, and a few times to find the first reply, one in
        the middle and the last as `_reply` does. None if the marks change the text, or those replies say otherwise.
        """
        stripped: list[Message] = [{**message, "content": message["content"].strip()} for message in messages]
        for given in (messages, stripped):  # a template may strip the contents, but does not strip the marks
            marked, _, contents = self._fill(given, asks=False, encloses=["assistant"])
            if marked == text and len(contents) == len(numbers):
                break
        else:
            return None
        before, asking = (self._fill(messages[: numbers[0]], asks)[0] for asks in (False, True))
        prompt = asking[_num_shared(before, asking) :]
        first = self._reply(messages, numbers[0], text)
        lead, tail = contents[0][0] - first[0], first[1] - contents[0][1]
        begin, end = text[first[0] - len(prompt) : contents[0][0]], text[contents[0][1] : first[1]]
        if lead < 0 or tail < 0 or not begin.startswith(prompt):
            return None
        spans = [(start - lead, stop + tail) for start, stop in contents]
        spans[-1] = self._reply(messages, numbers[-1], text)  # what ends a conversation may differ
        same = all(text.startswith(end, stop) and text.endswith(begin, 0, start) for start, stop in contents[:-1])
        middle = len(numbers) // 2
        return spans if same and spans[middle] == self._reply(messages, numbers[middle], text) else None

    def _reply(self, messages: Sequence[Message], number: int, text: str) -> tuple[int, int]:
        """Return the span of the assistant's message of this number.

        It begins where the template asks for a reply and ends before what comes next: after the control token that
        ends the turn, without whitespace behind it.
        """
        before, *_ = self._fill(messages[:number], asks=True)
        after, controls, _ = self._fill(messages[: number + 1], asks=False)
        if number + 1 == len(messages) or not text.startswith(after):
            after, controls = self._without_last_end(messages[: number + 1], after, controls)
        if not text.startswith(after) or not after.startswith(before):
            raise ConfigError(
                "the chat template lays a reply out differently once more messages follow, or when it asks for "
                "one, so it is unknown which tokens the assistant writes; enclose what it writes in "
                "{% generation %} and {% endgeneration %}"
            )
        stop = len(after)
        if controls and controls[-1][0] >= len(before) and not after[controls[-1][1] :].strip():
            stop = controls[-1][1]
        return len(before), stop

    def _without_last_end(
        self, messages: Sequence[Message], text: str, controls: list[tuple[int, int]]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of messages and its control tokens without what the template writes at the very end alone.

        Phi-3's, for example, writes the end of a document there, unless it asks for another reply.
        """
        asking, *_ = self._fill(messages, asks=True)
        stop = _num_shared(text, asking)
        stop = min([stop, *(start for start, end in controls if start < stop < end)])
        return text[:stop], [pair for pair in controls if pair[1] <= stop]


def _num_shared(first: str, second: str) -> int:
    """Return the number of characters with which both texts begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


class _RefusedError(Exception):
    """What a template says of messages that it refuses."""


class _Generation(Extension):
    """`{% generation %}`: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012, as the library declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the node of a block that is enclosed by marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    @staticmethod
    def made(block: nodes.CallBlock) -> bool:
        """Return whether a block of a template is such a tag."""
        called = block.call.node
        return isinstance(called, nodes.ExtensionAttribute) and called.identifier == _Generation.identifier

    def _enclosed(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _environment(date: datetime.datetime | None) -> ImmutableSandboxedEnvironment:
    """Return an environment with the settings and functions that transformers gives to chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )

    def refuse(message: str) -> None:
        raise _RefusedError(message)

    def as_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: (date or datetime.datetime.now()).strftime(form)
    environment.filters["tojson"] = as_json
    return environment

"""Prompts and their answers as token ids, with or without a chat template."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from megatrain.data.chat.template import ChatTemplate
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError

_LOG = logging.getLogger("megatrain")


class Prompts:
    """How a model's prompts become token ids: by a chat `template`, or as text after BOS if its documents begin so.

    Under a template only its own markers are control tokens, and what a message spells stays text.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._warned: set[str] = set()

    @property
    def prefix(self) -> int:
        """What stands before a text without context: BOS, or else the end of a document."""
        bos = self.tokenizer.beginning_of_document
        return self.tokenizer.end_of_document if bos is None else bos

    def encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, as `lay_out` returned it or as plain text."""
        if self.template is not None:
            return self.template.encode_prompt(prompt)
        return [*self.tokenizer.start(), *self.tokenizer.encode(prompt)]

    def pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and an answer, which are encoded as one text; spaces between belong to the answer.

        Text without a prompt follows `prefix`.
        """
        if not prompt:
            found = self.tokenizer.encode(answer)
            return ([self.prefix], found) if found[:1] != [self.prefix] else (found[:1], found[1:])
        stripped = prompt.rstrip()
        answer = prompt[len(stripped) :] + answer
        if self.template is not None:
            answer = self.template.kept_apart(answer)
        before = self.encode(stripped)
        return before, self.encode(stripped + answer)[len(before) :]

    def lay_out(self, messages: Sequence[Mapping[str, str]], continues: bool = False) -> str:
        """Return messages as a prompt for the assistant's next one; with `continues`, for the rest of the last one.

        A system message that the template refuses is left out, with a warning.
        """
        assert self.template is not None
        given = [dict(message) for message in messages]
        try:
            return self.template.prompt(given, continues)
        except ConfigError as error:
            without = [message for message in given if message["role"] != "system"]
            if len(without) == len(given):
                raise
            self.warn(f"{error}; the system message is left out")
            return self.template.prompt(without, continues)

    def ask(self, question: str, system: str | None = None) -> str:
        """Return a question as a prompt: by the template, after a system message if there is one, or as it is."""
        if self.template is None:
            return question
        begin = [] if system is None else [{"role": "system", "content": system}]
        return self.lay_out([*begin, {"role": "user", "content": question}])

    def warn(self, text: str) -> None:
        """Warn once of each thing."""
        if text not in self._warned:
            self._warned.add(text)
            _LOG.warning("warning: %s", text)


class Answer:
    """The text of one answer as its tokens arrive, and whether it is over."""

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], stops: Sequence[str]) -> None:
        """`ends` are the ids, and `stops` the texts, that end an answer."""
        self._ends, self._stops, self._vocab_size = ends, stops, tokenizer.vocab_size
        self._longest = max(map(len, stops), default=0)
        self._decoder = tokenizer.stream_decoder()
        self._text, self._is_finished = "", False
        self.ended = False
        """Whether an end or a stop came, and not only the largest number of tokens."""

    def is_over(self, token: int) -> bool:
        """Take a token; return whether it is an end, or completes a stop."""
        self.ended = token in self._ends or self._completes_stop(token)
        return self.ended

    def _completes_stop(self, token: int) -> bool:
        piece = self._decoder.push(token) if token < self._vocab_size else "\ufffd"
        self._text += piece
        tail = self._text[-(self._longest + len(piece)) :]
        return any(stop in tail for stop in self._stops)

    def text(self) -> str:
        """Return the answer, up to its first stop."""
        if not self._is_finished:
            self._text, self._is_finished = self._text + self._decoder.finish(), True
        return self._text[: min((at for stop in self._stops if (at := self._text.find(stop)) >= 0), default=None)]

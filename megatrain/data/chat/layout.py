"""Check that the chat template can lay a record out, in the worker that reads the record. Encodes nothing.

What the template refuses or leaves out is a bad record like any other: named by its file and line.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatrain.data.chat.conversation import Message
from megatrain.data.chat.errors import ConversationError
from megatrain.data.chat.template import PREPARED_ON, ChatTemplate
from megatrain.data.tokenizer_loading import find_tokenizer
from megatrain.errors import ConfigError

_REMEDY = "change the record or data.chat_template"


@dataclass(frozen=True)
class Layout:
    """A chat template, and the kind, place and fingerprint of the tokenizer whose control tokens it writes."""

    template: str
    fingerprint: str
    kind: str
    path: str

    def check(self, messages: list[Message], asks: bool = False, given: int = 0) -> None:
        """Check that the template writes all messages, and a reply after the first `given` ones.

        With `asks` the messages are a prompt, which needs no reply. Raises `ConversationError`.
        """
        chat = _template(self)
        try:
            rendered = chat.render(messages, asks)
            lost = chat.left_out(messages, asks)
        except ConfigError as error:
            raise ConversationError("refused_by_template", str(error), _REMEDY) from error
        if lost:
            number = lost[0]
            raise ConversationError(
                "dropped_by_template",
                f"the chat template leaves out message {number + 1} ({messages[number]['role']}), or a part of it",
                _REMEDY,
            )
        if not asks and not any(stop > start for start, stop in sorted(rendered.spans)[given:]):
            raise ConversationError(
                "nothing_in_loss", "the chat template marks nothing of the reply as the assistant's", _REMEDY
            )


@functools.lru_cache(maxsize=1)
def _template(layout: Layout) -> ChatTemplate:
    """Load the template once per process."""
    return ChatTemplate(find_tokenizer(layout.kind, layout.path), layout.template, PREPARED_ON)

"""What is wrong with a record of messages."""

from __future__ import annotations


class ConversationError(Exception):
    """A record without a conversation that can be tuned on: a kind, to be counted, a message, and what would help."""

    def __init__(self, kind: str, message: str, remedy: str = "mend it") -> None:
        super().__init__(message)
        self.kind, self.message, self.remedy = kind, message, remedy

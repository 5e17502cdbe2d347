"""Text to token ids and back: what every tokenizer offers. The two kinds are in tokenizer_sentencepiece.py and
tokenizer_hf.py, loading is in tokenizer_loading.py. Runs no code from files.

A saved tokenizer is a folder with `tokenizer.model` (SentencePiece) or `tokenizer.json` (Hugging Face), and
`megatrain_tokenizer.json` that says which. Loading is always by data: no pickles, no remote code.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from megatrain.errors import DataError

META = "megatrain_tokenizer.json"
SEGMENT = 4096
"""Characters encoded at once. Text is cut there at fixed places, so that memory and time stay linear in its length."""


class Tokenizer(ABC):
    """`encode` and `decode` are inverse on clean text (a Hugging Face tokenizer only as far as it is lossless itself)."""

    kind: str
    vocab_size: int
    end_of_document: int
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Nothing in the text becomes a control token; none is added."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of token ids; control tokens give none, broken UTF-8 gives U+FFFD."""

    @abstractmethod
    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes one id at a time."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder` (made if missing)."""

    def save_meta(self, folder: Path) -> None:
        meta = {"kind": self.kind, "end_of_document": self.end_of_document, "fingerprint": self.fingerprint}
        (folder / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


class StreamDecoder(ABC):
    """Text as it becomes certain: the pushed pieces and the finish together are the decoding of all ids."""

    @abstractmethod
    def push(self, token: int) -> str:
        """What this id makes certain (empty while a character is incomplete)."""

    @abstractmethod
    def finish(self) -> str:
        """What is left."""


def segments(text: str, limit: int = SEGMENT) -> Iterator[str]:
    """The text in pieces of at most `limit` characters, cut after a newline where there is one."""
    start = 0
    while len(text) - start > limit:
        stop = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a JSON file of a tokenizer") from error

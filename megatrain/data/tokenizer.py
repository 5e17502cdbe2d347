"""The interface of tokenizers: text to token ids and back.

The two kinds are in tokenizer_sentencepiece.py and tokenizer_hf.py, loading is in tokenizer_loading.py. A saved
tokenizer is a folder with `tokenizer.model` (SentencePiece) or `tokenizer.json` (Hugging Face), and a
`megatrain_tokenizer.json` that names the kind. No pickles are loaded and no code from files is run.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.errors import DataError

META = "megatrain_tokenizer.json"
SEGMENT = 4096
"""Characters encoded at once. Cutting long text into segments keeps memory and time linear in its length."""

Place = tuple[int, int, int]
"""Where an id is from: the number of the part, and its characters `[start, stop)` in there (a control token: 0, 1)."""


class Tokenizer(ABC):
    """A tokenizer. On clean text `decode` inverts `encode`, unless a Hugging Face tokenizer is itself lossy.

    `beginning_of_document` and `padding` are its BOS and padding ids, None if it has none (0 is an id like any other).
    `starts_with_bos` says whether the documents of its dataset or model begin with BOS.
    """

    kind: str
    vocab_size: int
    end_of_document: int
    beginning_of_document: int | None = None
    padding: int | None = None
    starts_with_bos: bool = False
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Names of control tokens in it are plain text; no control token is added."""

    def bulk_encoder(self) -> Callable[[str], np.ndarray]:
        """Return an encoder for large amounts of clean text: the ids of `encode`, as an array of integers."""
        return lambda text: np.array(self.encode(text), dtype=np.int64)

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids. Control tokens are omitted; invalid UTF-8 becomes U+FFFD."""

    @abstractmethod
    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that takes one id at a time."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder`, created if missing."""

    @abstractmethod
    def encode_marked(self, parts: Sequence[str | int]) -> tuple[list[int], list[Place]]:
        """Return the token ids of text parts and control tokens (given by id) as one text, and where each id is from.

        Names of control tokens in text parts are plain text.
        """

    @abstractmethod
    def control_names(self) -> list[str]:
        """Return the names of all control tokens."""

    @abstractmethod
    def named_tokens(self) -> dict[str, str | None]:
        """Return the names of the tokens that a chat template may ask for: `bos_token`, `eos_token`, `pad_token`."""

    @abstractmethod
    def use_chat_template(self, template: str) -> None:
        """Take another chat template, which `save` writes."""

    @abstractmethod
    def chat_template(self) -> str | None:
        """Return the Jinja template that the tokenizer came with; None if there is none."""

    @abstractmethod
    def control_token(self, name: str) -> int | None:
        """Return the id of a control token by its name, such as `<|im_start|>`; None if it has none of that name."""

    def start(self) -> list[int]:
        """Return the ids that precede the text of a document: BOS, or none."""
        if not self.starts_with_bos:
            return []
        assert self.beginning_of_document is not None
        return [self.beginning_of_document]

    def save_meta(self, folder: Path) -> None:
        """Write `megatrain_tokenizer.json` into `folder`, which must exist."""
        meta = {
            "kind": self.kind,
            "end_of_document": self.end_of_document,
            "starts_with_bos": self.starts_with_bos,
            "fingerprint": self.fingerprint,
        }
        (folder / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


class StreamDecoder(ABC):
    """Decodes ids one by one. The results of all `push` calls and `finish`, concatenated, are the decoded text."""

    @abstractmethod
    def push(self, token: int) -> str:
        """Return the text that this id completes; empty while a character is incomplete."""

    @abstractmethod
    def finish(self) -> str:
        """Return the remaining text."""


def segments(text: str, limit: int = SEGMENT) -> Iterator[str]:
    """Yield the text in pieces of at most `limit` characters, cut after a newline where possible."""
    start = 0
    while len(text) - start > limit:
        stop = text.rfind("\n", start, start + limit) + 1 or start + limit
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def read_text(path: Path) -> str:
    """Return a tokenizer's JSON file without a byte order mark. Raises `DataError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a JSON file of a tokenizer") from error


def saved_meta(folder: Path) -> dict[str, Any]:
    """Return what `save_meta` wrote into `folder`. Raises `DataError` if it lacks the kind or the fingerprint."""
    try:
        meta: dict[str, Any] = json.loads(read_text(folder / META))
        return {**meta, "kind": str(meta["kind"]), "fingerprint": str(meta["fingerprint"])}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / META}: damaged ({error})") from error

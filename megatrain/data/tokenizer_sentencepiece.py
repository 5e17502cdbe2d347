"""SentencePiece models with byte fallback, used losslessly. They are trained in train_sentencepiece.py."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from pathlib import Path

import xxhash

from megatrain.data.tokenizer import Place, StreamDecoder, Tokenizer, segments
from megatrain.errors import DataError

SETTINGS = "tokenizer_config.json"
"""Beside the model: its chat template, under `chat_template`, as transformers has it."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback, used losslessly.

    SentencePiece writes a space as U+2581. A U+2581 in the text itself is therefore encoded as its three byte pieces.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, origin: str, chat_template: str | None = None) -> None:
        import sentencepiece

        self._model = model
        self._chat_template = chat_template
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise DataError(
                f"{origin}: not a SentencePiece model{reason(error)}; give a .model file, or tokenizer=hf with a "
                "tokenizer.json"
            ) from error
        self.vocab_size = self._processor.vocab_size()
        self.end_of_document = self._processor.eos_id()
        self.beginning_of_document = _id_or_none(self._processor.bos_id())
        self.padding = _id_or_none(self._processor.pad_id())
        self.fingerprint = xxhash.xxh3_128_hexdigest(model)
        byte_ids = [self._processor.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
        if self.end_of_document < 0 or len(set(byte_ids)) < 256:
            raise DataError(
                f"{origin}: needs an end-of-sentence piece and byte fallback; train one without tokenizer.path"
            )
        self._marker = [byte_ids[b] for b in "▁".encode()]
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]
        for index, byte_id in enumerate(byte_ids):
            self._bytes[byte_id] = bytes([index])
        probe = _PROBE + "".join(self.control_names())
        if self.decode(self.encode(probe)) != probe:
            raise DataError(
                f"{origin}: decoding does not return the text exactly (the model normalises); use a lossless model"
            )

    def _piece_bytes(self, token: int) -> bytes:
        processor = self._processor
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_byte(token):
            return b""
        piece: str = processor.id_to_piece(token)
        return piece.replace("▁", " ").encode()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = []
        for index, part in enumerate(text.split("▁")):
            if index:
                ids += self._marker
            for segment in segments(part):
                ids += self._processor.encode(segment)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without control tokens; invalid UTF-8 becomes U+FFFD."""
        table = self._bytes
        return b"".join([table[i] for i in ids]).decode("utf-8", errors="replace")

    def encode_marked(self, parts: Sequence[str | int]) -> tuple[list[int], list[Place]]:
        """Return the ids of text parts and control tokens, and where each is from."""
        ids: list[int] = []
        places: list[Place] = []
        for number, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
                places.append((number, 0, 1))
                continue
            found = self.encode(part)
            ids += found
            character = [at for at, one in enumerate(part) for _ in one.encode()] + [len(part)]  # of each byte
            stop = 0
            for token in found:
                start, stop = stop, stop + len(self._bytes[token])
                places.append((number, character[start], character[stop - 1] + 1))
        return ids, places

    def control_names(self) -> list[str]:
        """Return the names of all control pieces."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size) if self._processor.is_control(i)]

    def named_tokens(self) -> dict[str, str | None]:
        """Return the names of BOS, EOS and padding."""
        ids = {"bos_token": self.beginning_of_document, "eos_token": self.end_of_document, "pad_token": self.padding}
        return {name: None if token is None else self._processor.id_to_piece(token) for name, token in ids.items()}

    def use_chat_template(self, template: str) -> None:
        """Take another chat template."""
        self._chat_template = template

    def chat_template(self) -> str | None:
        """Return the template that the model came with."""
        return self._chat_template

    def control_token(self, name: str) -> int | None:
        """Return the id of a control piece by its name; None if it has none of that name."""
        found: int = self._processor.piece_to_id(name)
        return found if self._processor.is_control(found) else None

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that takes one id at a time."""
        return _ByteStream(self._bytes)

    def save(self, folder: Path) -> None:
        """Write the model, its chat template if it has one, and the meta file into `folder`, created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
        if self._chat_template:
            settings = json.dumps({"chat_template": self._chat_template}, indent=1)
            (folder / SETTINGS).write_text(settings + "\n", encoding="utf-8")
        self.save_meta(folder)


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None


_PROBE = "  \uff21 \ufb01\t\n\n   x▁▁ é\U0001f600 <s></s><unk><0x41>\n "


class _ByteStream(StreamDecoder):
    """Decodes pieces that are byte strings, holding back incomplete characters."""

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that this id completes; empty while a character is incomplete."""
        return self._decoder.decode(self._table[token])

    def finish(self) -> str:
        """Return the remaining text, with U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)


def reason(error: object) -> str:
    """Return the library's message in parentheses, without its source file and condition; empty if nothing is left."""
    text = re.sub(r"^\w+: \S+\(\d+\) \[.*\]\s*", "", str(error)).strip()
    return f" ({text})" if text else ""

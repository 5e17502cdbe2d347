"""SentencePiece: train and use lossless BPE models with byte fallback."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path

import xxhash

from megatrain.data.tokenizer import SEGMENT, StreamDecoder, Tokenizer, segments
from megatrain.errors import DataError


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback, used losslessly.

    SentencePiece writes a space as U+2581. A U+2581 in the text itself is therefore encoded as its three byte pieces.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, origin: str) -> None:
        import sentencepiece

        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise DataError(
                f"{origin}: not a SentencePiece model{_reason(error)}; give a .model file, or tokenizer=hf with a "
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
        names = [self._processor.id_to_piece(i) for i in range(self.vocab_size) if self._processor.is_control(i)]
        probe = _PROBE + "".join(names)
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

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that takes one id at a time."""
        return _ByteStream(self._bytes)

    def save(self, folder: Path) -> None:
        """Write the model and the meta file into `folder`, created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._model)
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


def train_sentencepiece(texts: Iterator[str], vocab_size: int, bos: bool = False) -> SentencePieceTokenizer:
    """Train a BPE model with byte fallback on clean texts, read once; `bos` gives it a BOS token.

    The same texts in the same order give the same model on every machine. Pieces may be runs of spaces and may join
    letters with punctuation (`(self,`), which makes code shorter. Raises `DataError` if the texts are too few.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9999,
            required_chars="▁",  # or, if no text has a space, a space would be encoded like a U+2581
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            max_sentence_length=4 * SEGMENT,
            num_threads=4,  # fixed, because the model file records it; the pieces do not depend on it
            unk_id=0,
            eos_id=1,
            bos_id=2 if bos else -1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise _training_error(str(error), vocab_size) from error
    return SentencePieceTokenizer(model.getvalue(), "the trained tokenizer")


def _training_error(error: str, vocab_size: int) -> DataError:
    """Return what the library's error means for the user."""
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return DataError(
            f"tokenizer.vocab_size={vocab_size}: too small for the characters of this text, which need "
            f"{needed[1]} pieces with the bytes; give tokenizer.vocab_size={needed[1]} or more"
        )
    if "sentences_.empty()" in error:
        return DataError(
            "the text to train a tokenizer on has nothing but line ends; give more text, or a trained tokenizer "
            "(tokenizer.path)"
        )
    return DataError(f"tokenizer.vocab_size={vocab_size}: the tokenizer could not be trained{_reason(error)}")


def _reason(error: object) -> str:
    """Return the library's message in parentheses, without its source file and condition; empty if nothing is left."""
    text = re.sub(r"^\w+: \S+\(\d+\) \[.*\]\s*", "", str(error)).strip()
    return f" ({text})" if text else ""


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        for part in text.split("▁"):
            for sentence in segments(part):
                if sentence.strip("\n"):
                    yield sentence

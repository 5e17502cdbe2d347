"""Train SentencePiece models, BPE or unigram: lossless, with byte fallback, the same on every machine."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from megatrain.config import TokenizerConfig
from megatrain.data.special_tokens import chat_template, special_tokens
from megatrain.data.tokenizer import SEGMENT, segments
from megatrain.data.tokenizer_sentencepiece import SentencePieceTokenizer, reason
from megatrain.errors import DataError

UNKNOWN, END, BEGIN = "<unk>", "</s>", "<s>"
_SCORE_STEP = 1 / 256
"""Scores of unigram pieces are multiples of this. Their sums over a segment are then exact in fp32, so that other
implementations, which add in fp64, find the same segmentation."""

_THREE_DIGITS = re.compile(r"(\d{3})(?=\d)")
_CUT = "\0"  # which clean text does not have
_RUNS = re.compile(r"\n+|\t+|[^\n\t]+")


def train_sentencepiece(texts: Iterator[str], config: TokenizerConfig, bos: bool = False) -> SentencePieceTokenizer:
    """Train on clean texts, read once; `bos` gives it a BOS token.

    Ids are those of the control tokens, the 256 bytes, then of the pieces. The same texts in the same order give the
    same model on every machine. The vocabulary is smaller than `tokenizer.vocab_size` if the texts have no more pieces.
    Raises ConfigError for a control token or chat template that is none, `DataError` if the texts are too few.
    """
    import sentencepiece

    names = special_tokens(config, [UNKNOWN, END, *([BEGIN] if bos else [])])
    unigram = config.kind == "unigram"
    further: dict[str, Any] = {"control_symbols": names[2 + bos :]} if len(names) > 2 + bos else {}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, config),
            model_writer=model,
            model_type="unigram" if unigram else "bpe",
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9999,
            # "▁": or, if no text has a space, a space would be encoded like a U+2581.
            required_chars="▁" + ("".join(sorted(set("".join(names)) | set(_OF_BYTES))) if unigram else ""),
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=config.whitespace != "single",
            split_by_unicode_script=config.punctuation == "apart",
            split_digits=config.digits == "single",
            input_sentence_size=0,
            shuffle_input_sentence=False,
            max_sentence_length=4 * SEGMENT,
            # fixed, because the model file records it; BPE's pieces do not depend on it, those of unigram do
            num_threads=1 if unigram else 4,
            unk_id=0,
            eos_id=1,
            bos_id=2 if bos else -1,
            pad_id=-1,
            minloglevel=2,
            **further,
        )
    except (RuntimeError, ValueError) as error:
        raise _training_error(str(error), config.vocab_size) from error
    content = _rounded(model.getvalue()) if unigram else model.getvalue()
    return SentencePieceTokenizer(content, "the trained tokenizer", chat_template(config))


_OF_BYTES = "<0x123456789ABCDEF>"
"""The characters of the names of bytes: where all are pieces, a name in a text is more likely as letters (see
`interop/hf_tokenizer.py`)."""


def _rounded(model: bytes) -> bytes:
    """Round the scores of a unigram model's pieces to multiples of `_SCORE_STEP`."""
    from sentencepiece import sentencepiece_model_pb2

    content = sentencepiece_model_pb2.ModelProto()
    content.ParseFromString(model)
    for piece in content.pieces:
        if piece.type == sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL:
            piece.score = round(piece.score / _SCORE_STEP) * _SCORE_STEP
    rounded: bytes = content.SerializeToString(deterministic=True)
    return rounded


def _training_error(error: str, vocab_size: int) -> DataError:
    """Return what the library's error means for the user."""
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return DataError(
            f"tokenizer.vocab_size={vocab_size}: too small for control tokens, bytes and the characters of this text, "
            f"which need {needed[1]} pieces; give tokenizer.vocab_size={needed[1]} or more"
        )
    if "sentences_.empty()" in error:
        return DataError(
            "the text to train a tokenizer on has nothing but line ends; give more text, or a trained tokenizer "
            "(tokenizer.path)"
        )
    return DataError(f"tokenizer.vocab_size={vocab_size}: the tokenizer could not be trained{reason(error)}")


def _sentences(texts: Iterator[str], config: TokenizerConfig) -> Iterator[str]:
    """Yield what pieces are learned from. No piece reaches across the end of a sentence: so cuts make rules."""
    for text in texts:
        for part in text.split("▁"):
            for segment in segments(part):
                for sentence in [segment] if config.whitespace == "joined" else _apart(segment, config.whitespace):
                    if not sentence.strip("\n"):
                        continue
                    if config.digits == "threes":
                        yield from _THREE_DIGITS.sub(rf"\1{_CUT}", sentence).split(_CUT)
                    else:
                        yield sentence


def _apart(text: str, whitespace: str) -> Iterator[str]:
    """Yield the text without line ends and tabs, and with `runs` each run of them too.

    The library drops line ends at the end of a sentence, so a run of them is followed by a space, which no piece joins
    to what is before it. Single line ends and tabs need no pieces: each is one token, that of its byte.
    """
    for run in _RUNS.findall(text):
        if run[0] not in "\n\t":
            yield run
        elif whitespace == "runs":
            yield f"{run} "

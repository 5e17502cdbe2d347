"""What a worker does with a frame of clean text: encode it. A pure function of the frame and the tokenizer."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatrain.data.chat.conversation import Message, from_text
from megatrain.data.chat.pair import SIDES, pair_from_text
from megatrain.data.chat.prompt import encode_prompt
from megatrain.data.chat.template import PREPARED_ON, ChatTemplate
from megatrain.data.corpus.cleaned import Frame, unpack
from megatrain.data.corpus.fill_in_the_middle import FillInTheMiddle
from megatrain.data.corpus.selection import HELDOUT, TRAIN
from megatrain.data.indexed import REJECTED
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import load_tokenizer


@dataclass(frozen=True)
class EncodeTask:
    """A frame of `text`, a flag per document (of `selection.py`), and the tokenizer and dtype to use.

    `fim` rearranges documents of the train split. With `chat`, a Jinja template, they are conversations,
    or preference pairs.
    """

    text: Path
    frame: Frame
    flags: bytes
    tokenizer: Path
    fingerprint: str
    starts_with_bos: bool
    dtype: str
    fim: FillInTheMiddle | None = None
    chat: str | None = None


@dataclass(frozen=True)
class EncodedSplit:
    """Documents' concatenated token ids, the number of ids in each (int32), and their bytes of text.

    `counts` (uint8) has the marks of each token of conversations (indexed.py).
    """

    ids: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    counts: np.ndarray | None = None


@dataclass(frozen=True)
class Encoded:
    """The documents of each split. `text_bytes` counts dropped documents too."""

    splits: dict[int, EncodedSplit]
    text_bytes: int


@functools.lru_cache(maxsize=1)
def _load(folder: Path, fingerprint: str, starts_with_bos: bool) -> tuple[Tokenizer, Callable[[str], np.ndarray]]:
    """Load the tokenizer once per process; the cache key has its properties because the folder may be rewritten."""
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.fingerprint, tokenizer.starts_with_bos) == (fingerprint, starts_with_bos)
    return tokenizer, tokenizer.bulk_encoder()


def encode_chunk(task: EncodeTask) -> Encoded:
    """Encode the kept documents of a frame.

    Each stands between BOS (if the dataset has it) and the end-of-document token. A conversation has what its template
    gives it, and then the end-of-document token, unless it ends with that.
    """
    tokenizer, encode = _load(task.tokenizer, task.fingerprint, task.starts_with_bos)
    first, last = np.array(tokenizer.start(), task.dtype), np.array([tokenizer.end_of_document], task.dtype)
    chat = ChatTemplate(tokenizer, task.chat, PREPARED_ON) if task.chat else None
    found: dict[int, tuple[list[np.ndarray], list[int], list[np.ndarray]]] = {}
    sizes: Counter[int] = Counter()
    total = 0
    for flag, text in zip(task.flags, unpack(task.text, task.frame), strict=True):
        total += len(text)
        if flag not in (TRAIN, HELDOUT):
            continue
        arrays, lengths, counted = found.setdefault(flag, ([], [], []))
        if chat:
            ids, counts = _marked(chat, text.decode())
            arrays.append(ids.astype(task.dtype))
            counted.append(counts)
            lengths.append(len(ids))
        else:
            ids = task.fim.encode(text.decode(), encode) if task.fim and flag == TRAIN else encode(text.decode())
            arrays += [first, ids.astype(task.dtype), last]
            lengths.append(len(first) + len(ids) + 1)
        sizes[flag] += len(text)
    splits = {}
    for flag, (arrays, lengths, counted) in found.items():
        of_all = np.concatenate(counted) if chat else None
        splits[flag] = EncodedSplit(np.concatenate(arrays), np.array(lengths, np.int32), sizes[flag], of_all)
    return Encoded(splits, total)


def _marked(chat: ChatTemplate, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a conversation, a pair or a prompt, and the marks of each id (indexed.py)."""
    found = from_text(text)
    if not isinstance(found, dict):
        return _conversation(chat, found)
    if SIDES[0] not in found:
        return encode_prompt(chat, found)
    pair = pair_from_text(text)
    chosen, rejected = (_conversation(chat, getattr(pair, side), pair.num_given, always_ends=True) for side in SIDES)
    return np.concatenate([chosen[0], rejected[0]]), np.concatenate([chosen[1], rejected[1] | REJECTED])


def _conversation(
    chat: ChatTemplate, messages: list[Message], given: int = 0, always_ends: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a conversation, and of each whether it counts in the loss. A last end token does not.

    With `always_ends` the end token is added even if the template writes one, so that what the template writes is
    followed by it.
    """
    encoded = chat.encode(messages, given=given)
    ids, counts = encoded.ids, encoded.counts
    if always_ends or ids[-1] != chat.tokenizer.end_of_document:
        ids, counts = [*ids, chat.tokenizer.end_of_document], [*counts, False]
    return np.array(ids), np.array(counts, np.uint8)

"""What a worker does with a frame of clean text: encode it. A pure function of the frame and the tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatrain.data.corpus.cleaned import Frame, unpack
from megatrain.data.corpus.fill_in_the_middle import FillInTheMiddle
from megatrain.data.corpus.selection import HELDOUT, TRAIN
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import load_tokenizer


@dataclass(frozen=True)
class EncodeTask:
    """A frame of `text`, a flag per document (of `selection.py`), and the tokenizer and dtype to use.

    `fim` rearranges documents of the train split.
    """

    text: Path
    frame: Frame
    flags: bytes
    tokenizer: Path
    fingerprint: str
    starts_with_bos: bool
    dtype: str
    fim: FillInTheMiddle | None = None


@dataclass(frozen=True)
class Encoded:
    """Per split: its documents' concatenated token ids, the number of ids in each, and their bytes of text.

    `text_bytes` counts dropped documents too.
    """

    splits: dict[int, tuple[np.ndarray, np.ndarray, int]]
    text_bytes: int


@functools.lru_cache(maxsize=1)
def _load(folder: Path, fingerprint: str, starts_with_bos: bool) -> tuple[Tokenizer, Callable[[str], np.ndarray]]:
    """Load the tokenizer once per process; the cache key has its properties because the folder may be rewritten."""
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.fingerprint, tokenizer.starts_with_bos) == (fingerprint, starts_with_bos)
    return tokenizer, tokenizer.bulk_encoder()


def encode_chunk(task: EncodeTask) -> Encoded:
    """Encode the kept documents of a frame, each between BOS (if the dataset has it) and the end-of-document token."""
    tokenizer, encode = _load(task.tokenizer, task.fingerprint, task.starts_with_bos)
    first, last = np.array(tokenizer.start(), task.dtype), np.array([tokenizer.end_of_document], task.dtype)
    found: dict[int, tuple[list[np.ndarray], list[int], int]] = {}
    total = 0
    for flag, text in zip(task.flags, unpack(task.text, task.frame), strict=True):
        total += len(text)
        if flag not in (TRAIN, HELDOUT):
            continue
        ids = task.fim.encode(text.decode(), encode) if task.fim and flag == TRAIN else encode(text.decode())
        arrays, lengths, size = found.get(flag, ([], [], 0))
        arrays += [first, ids.astype(task.dtype), last]
        lengths.append(len(first) + len(ids) + 1)
        found[flag] = (arrays, lengths, size + len(text))
    return Encoded(
        {f: (np.concatenate(a), np.array(n, dtype=np.int32), size) for f, (a, n, size) in found.items()}, total
    )

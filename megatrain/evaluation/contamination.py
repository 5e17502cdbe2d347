"""Which texts of an evaluation occur in training data: those that share a word n-gram with a training document.

The words and the defaults are those of the cleaning step `decontaminate`, which keeps such documents out of a dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatrain.data.corpus.words import hash_ngrams, hash_words

NGRAM = 13
"""Words in a row that two texts must share (Brown et al., 2020, arXiv:2005.14165, appendix C)."""
LEAST = 8
"""Words that a shorter text must have to be looked for, as a whole; fewer are too common to tell anything."""
_BATCH = 2**20  # characters of training documents that are hashed at a time


@dataclass(frozen=True)
class Contamination:
    """Whether each text occurs in the training documents, and whether it is too short to tell; their number."""

    occurs: list[bool]
    too_short: list[bool]
    training_documents: int


def find_contamination(texts: Sequence[str], documents: Iterable[str]) -> Contamination:
    """Look for texts in documents, by hashes of 64 bits.

    Case, punctuation, accents and spacing do not count; a Chinese character is a word.
    """
    words = hash_words(list(texts))
    counts = np.diff(words.offsets)
    tables = []
    for length in sorted({NGRAM, *(int(count) for count in counts if LEAST <= count < NGRAM)}):
        hashes, offsets = hash_ngrams(words, length, short=False)
        owners = np.repeat(np.arange(len(texts)), np.diff(offsets))
        wanted = counts[owners] >= NGRAM if length == NGRAM else counts[owners] == length
        unique, places = np.unique(hashes[wanted], return_inverse=True)
        tables.append((length, unique, places, owners[wanted], np.zeros(len(unique), dtype=bool)))
    number = 0
    for batch in _batches(documents):
        number += len(batch)
        hashed = hash_words(batch)
        for length, unique, _, _, seen in tables:
            seen |= np.isin(unique, hash_ngrams(hashed, length, short=False)[0])
    occurs = np.zeros(len(texts), dtype=bool)
    for _, _, places, owners, seen in tables:
        occurs[owners[seen[places]]] = True
    return Contamination(occurs.tolist(), (counts < LEAST).tolist(), number)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

"""MinHash signatures of documents: how alike the sets of their word n-grams are, in a few hundred bytes each.

A. Broder, "On the resemblance and containment of documents", 1997: the share of equal hashes in two signatures
estimates the Jaccard similarity of the two sets. Opens no files.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatrain.config.clean_config import MinhashConfig
from megatrain.data.corpus.source import require_library
from megatrain.data.corpus.words import hash_ngrams, hash_words

_ALGORITHM = 1
"""Raise it when the n-grams of a text or their hashes change."""


@dataclass(frozen=True)
class Signing:
    """All that decides a document's signature. Signatures that were made otherwise cannot be compared."""

    ngram: int
    hashes: int
    seed: int
    library: str
    library_algorithm: int
    algorithm: int = _ALGORITHM

    @staticmethod
    def of(config: MinhashConfig) -> Signing:
        """Return how signatures are made here and now. Raises `EnvironmentFault` if the library is missing."""
        rensa = _rensa()
        library = f"rensa {importlib.metadata.version('rensa')}"
        return Signing(
            config.ngram, config.bands * config.rows, config.seed, library, int(rensa.RMinHash.ALGORITHM_VERSION)
        )

    def settings(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def sign(texts: Sequence[str], signing: Signing) -> np.ndarray:
    """Return the signatures of texts, `[texts, hashes]` of 32 bits; those of texts without a word are all zeros."""
    ngrams, offsets = hash_ngrams(hash_words(texts), signing.ngram, short=True)
    matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(
        ngrams, offsets.astype(np.uint64), signing.hashes, signing.seed
    )
    signatures = np.array(matrix.to_rows(), np.uint32).reshape(len(texts), signing.hashes)
    signatures[np.diff(offsets) == 0] = 0
    return signatures


def jaccard(one: str, other: str, ngram: int) -> float:
    """Return the Jaccard similarity of the sets of word n-grams of two texts: 1 if they are equal."""
    sets = [set(hash_ngrams(hash_words([text]), ngram, short=True)[0].tolist()) for text in (one, other)]
    return len(sets[0] & sets[1]) / max(len(sets[0] | sets[1]), 1)


def _rensa() -> Any:
    # One thread a worker: the workers are as many as the cores. The library reads this when it is first used.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    return require_library("rensa", "clean.dedup=minhash", extra="corpus")

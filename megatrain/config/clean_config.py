"""`clean.*`: the cleaning recipe of a corpus. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatrain.config.key import key


@dataclass
class MinhashConfig:
    """How near duplicates are found: MinHash signatures in bands, the candidates compared by their whole signatures."""

    ngram: int = key(5, "words in an n-gram; two documents are as alike as their sets of n-grams", minimum=1)
    bands: int = key(14, "bands of a signature; documents with an equal band are compared", minimum=1, maximum=1000)
    rows: int = key(8, "hashes in a band; at most 10,000 in all bands", minimum=1, maximum=1000)
    threshold: float = key(
        0.75, "estimated Jaccard similarity from which documents are near duplicates", minimum=0, maximum=1
    )
    seed: int = key(1, "seed of the hashes", minimum=0)


@dataclass
class CleanConfig:
    """What is done to a document's text before it is deduplicated and tokenized."""

    name: str = key("none", "name of the recipe")
    steps: list[Any] = key(
        [],
        "cleaning steps in order, each a name, or a name with parameters: [{length: {min_characters: 200}}]; "
        "docs/reference/cleaning.md lists them",
    )
    dedup: str = key(
        "exact",
        "documents to drop as duplicates: none, those of exactly equal text, or with minhash also near duplicates (of "
        "each cluster the first is kept)",
        choices=("none", "exact", "minhash"),
    )
    dedup_passages: str = key(
        "none",
        "passages to cut out of documents if they repeat earlier text of the corpus: none, lines, or paragraphs, which "
        "empty lines separate",
        choices=("none", "lines", "paragraphs"),
    )
    min_passage_characters: int = key(
        20, "shortest passage that clean.dedup_passages looks at, in characters; shorter ones stay", minimum=1
    )
    minhash: MinhashConfig = field(default_factory=MinhashConfig)
    dedup_memory_mb: int = key(1024, "memory for finding duplicates, in MiB; less takes more passes", minimum=1)

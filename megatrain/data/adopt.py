"""Adopt foreign Megatron-LM data: make a dataset folder, card and hashes for existing `.bin/.idx` pairs.

Nothing is copied: the dataset's folder links to the files. Token ids stay as they are, end-of-document tokens included.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.data.card import SPLITS, Card, SplitCard, TokenizerCard, card_of_files, fingerprint
from megatrain.data.indexed import pair, read_header
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError


def check_prefixes(paths: list[str]) -> dict[str, Path]:
    """Return each split's file prefix. Raises `ConfigError` or `DataError` if a file is missing or incomplete."""
    if not 1 <= len(paths) <= len(SPLITS):
        raise ConfigError(
            f"data.paths={paths}: data=megatron takes one prefix (train) or two (train, held-out), "
            "such as [corpus_text_document]"
        )
    prefixes = {}
    for split, given in zip(SPLITS, paths, strict=False):
        prefix = Path(given.removesuffix(".bin").removesuffix(".idx")).expanduser().absolute()
        if not any(path.is_file() for path in pair(prefix)):
            raise ConfigError(f"data.paths: there is no {prefix}.bin and .idx; give the prefix that both files share")
        read_header(prefix)
        prefixes[split] = prefix
    return prefixes


def link(prefixes: dict[str, Path], folder: Path) -> None:
    """Symlink each split's pair into `folder` under the split's name."""
    for split, prefix in prefixes.items():
        for source, name in zip(pair(prefix), pair(folder / split), strict=True):
            os.symlink(source, name)


def make_card(folder: Path, name: str, tokenizer: Tokenizer | None, **also: Any) -> Card:
    """Return the card of a folder with `train.bin/.idx` and perhaps `heldout.bin/.idx`; reads the files once.

    `tokenizer` is the one that made the ids, if known; `also` are further fields of the card. Raises `DataError` if a
    pair is incomplete. The caller saves the card.
    """
    splits: dict[str, SplitCard] = {
        split: card_of_files(folder / split) for split in SPLITS if pair(folder / split)[1].exists() or split == "train"
    }
    made_by = None
    if tokenizer is not None:
        tokenizer.starts_with_bos = _first_id(folder / "train", splits["train"]) == tokenizer.beginning_of_document
        made_by = TokenizerCard.of(tokenizer)
    return Card(name=name, fingerprint=fingerprint(splits), splits=splits, tokenizer=made_by, **also)


def _first_id(prefix: Path, split: SplitCard) -> int:
    """Return the first token id of a split, -1 if it has none."""
    ids = np.fromfile(pair(prefix)[0], dtype=split.dtype, count=min(1, split.tokens))
    return int(ids[0]) if len(ids) else -1

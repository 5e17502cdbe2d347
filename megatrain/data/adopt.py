"""Adopt foreign Megatron-LM data: make a dataset folder, card and hashes for existing `.bin/.idx` pairs.

Nothing is copied: the dataset's folder links to the files. Token ids stay as they are, end-of-document tokens included.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.data.card import SPLITS, Card, SplitCard, TokenizerCard, card_of_files, card_of_parts, fingerprint
from megatrain.data.corpus.file_search import expand
from megatrain.data.indexed import loss_file, pair, read_header
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError

_PAIR = (".bin", ".idx")


def check_prefixes(paths: list[str]) -> dict[str, list[Path]]:
    """Return each split's file prefixes, in the order in which they are read.

    One path names the train split, two the train and the held-out split, more than two train alone. A path is a prefix,
    a glob of prefixes, a folder of pairs, or a text file with a prefix in each line. Matches of a glob and of a folder
    are sorted. Raises `ConfigError` or `DataError` if a file is missing or incomplete, a pair is named twice, or the
    held-out split has a file of the train split.
    """
    if not paths:
        raise ConfigError(
            f"data.paths={paths}: data=megatron takes one prefix (train), two (train, held-out), or more (all train), "
            "such as [corpus_text_document]; each may be a glob, a folder or a text file of prefixes"
        )
    splits = [[path] for path in paths] if len(paths) <= len(SPLITS) else [paths]
    prefixes = {}
    for split, given in zip(SPLITS, splits, strict=False):
        found = [prefix for path in given for prefix in _prefixes(path)]
        if twice := sorted({str(prefix) for prefix in found if found.count(prefix) > 1}):
            raise ConfigError(f"data.paths: {twice[0]} is named more than once; name each pair once")
        for prefix in found:
            if not any(path.is_file() for path in pair(prefix)):
                raise ConfigError(
                    f"data.paths: there is no {prefix}.bin and .idx; give the prefix that both files share"
                )
            read_header(prefix)
            if loss_file(prefix).exists():
                raise ConfigError(
                    f"data.paths: {prefix} has conversations, and {loss_file(prefix).name} says which of their tokens "
                    "count in the loss, which would be lost; copy the whole dataset's folder and name it by data.dir "
                    "and data.name"
                )
        prefixes[split] = found
    _check_apart(*prefixes.values())
    return prefixes


def _check_apart(train: list[Path], heldout: Sequence[Path] = ()) -> None:
    """Raise `ConfigError` if a held-out pair is a train pair, whatever links or spellings lead to it."""
    trained = {_identity(prefix): prefix for prefix in train}
    for prefix in heldout:
        if also := trained.get(_identity(prefix)):
            raise ConfigError(
                f"data.paths: the held-out {prefix}.bin is {also}.bin of the train split; a held-out loss on training "
                "data says nothing, so give other pairs, or the train pairs alone"
            )


def check_contents_apart(card: Card, prefixes: dict[str, list[Path]]) -> None:
    """Raise `ConfigError` if a held-out pair is a copy of a train pair.

    `card` is that of the pairs in `prefixes`, whose hashes it compares.
    """
    trained: dict[tuple[str, ...], Path] = {}
    for split in prefixes:
        for prefix, (_, part) in zip(prefixes[split], card.splits[split].pairs(split), strict=True):
            contents = (part.dtype, str(part.bin_size), *part.block_hashes)
            if split == "train":
                trained[contents] = prefix
            elif part.tokens and (also := trained.get(contents)):
                raise ConfigError(
                    f"data.paths: the held-out {prefix}.bin has the same contents as {also}.bin of the train split; a "
                    "held-out loss on training data says nothing, so give other pairs, or the train pairs alone"
                )


def _identity(prefix: Path) -> tuple[int, int]:
    """Return the device and inode of a pair's `.bin`, the same through every link and spelling of its path."""
    found = pair(prefix)[0].stat()
    return found.st_dev, found.st_ino


def _prefixes(given: str) -> list[Path]:
    """Return the prefixes that a path stands for, absolute; the path itself if it is no glob, folder or list."""
    place = Path(given).expanduser()
    if place.suffix in _PAIR or not place.is_file() or _has_index(place):
        return _matches(given)
    return [prefix for line in _lines(place) for prefix in _matches(line)]


def _matches(given: str) -> list[Path]:
    """Return the prefixes that a glob or a folder stands for, sorted; the path itself if it is neither.

    A file without its partner counts, so that the caller refuses it instead of losing a shard.
    """
    stem, place = given.removesuffix(".bin").removesuffix(".idx"), Path(given).expanduser()
    if place.is_dir() and not _has_index(place):
        files = [str(path) for suffix in _PAIR for path in place.glob(f"*{suffix}")]
        if not files:
            raise ConfigError(f"data.paths: the folder {place} has no .idx; give .bin/.idx pairs, by prefix or folder")
    else:
        files = [name for suffix in _PAIR for name in expand(stem + suffix)] or [f"{stem}.idx"]
    names = sorted({f"{os.path.splitext(name)[0]}.idx" for name in files})
    return [Path(name.removesuffix(".idx")).expanduser().absolute() for name in names]


def _has_index(prefix: Path) -> bool:
    """Return whether a path is the prefix of an `.idx`. The folders `.` and `/` have no name, and so are none."""
    return bool(prefix.name) and pair(prefix)[1].is_file()


def _lines(file: Path) -> list[str]:
    """Return the prefixes of a text file; relative ones are found from the working folder, or else from the file's.

    Raises `ConfigError` if the file has none, is not text, or gives weights.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.paths: {file} is not a list of prefixes (byte {error.start} is not UTF-8)") from error
    found = []
    for line in lines:
        if not line or line.startswith("#"):
            continue
        if re.fullmatch(r"[0-9.eE+-]+\s+\S.*", line):
            raise ConfigError(f"data.paths: {file}: {line!r} gives a weight; give prefixes alone, one a line")
        here = any(path.is_file() for prefix in _matches(line) for path in pair(prefix))
        found.append(line if here else str(file.parent / line))
    if not found:
        raise ConfigError(f"data.paths: {file} names no prefix; write one a line")
    return found


def link(prefixes: dict[str, list[Path]], folder: Path) -> None:
    """Symlink each split's pairs into `folder` under the split's name, numbered if there are several."""
    for split, found in prefixes.items():
        for at, prefix in enumerate(found):
            name = split if len(found) == 1 else f"{split}_{at:05d}"
            for source, target in zip(pair(prefix), pair(folder / name), strict=True):
                os.symlink(source, target)


def _split_cards(folder: Path) -> dict[str, SplitCard]:
    """Return the card of each split whose pair or numbered pairs are in a folder; there must be a train split."""
    found = {}
    for split in SPLITS:
        parts = sorted(folder.glob(f"{split}_[0-9][0-9][0-9][0-9][0-9].idx"))
        if parts:
            found[split] = card_of_parts([card_of_files(path.with_suffix("")) for path in parts])
        elif split == "train" or pair(folder / split)[1].exists():
            found[split] = card_of_files(folder / split)
    return found


def make_card(folder: Path, name: str, tokenizer: Tokenizer | None, **also: Any) -> Card:
    """Return the card of a folder with `train.bin/.idx` and perhaps `heldout.bin/.idx`; reads the files once.

    A split may consist of numbered pairs, `train_00000.bin/.idx` and so on.

    `tokenizer` is the one that made the ids, if known; `also` are further fields of the card. Raises `DataError` if a
    pair is incomplete. The caller saves the card.
    """
    splits = _split_cards(folder)
    made_by = None
    if tokenizer is not None:
        name, first = splits["train"].pairs("train")[0]
        tokenizer.starts_with_bos = _first_id(folder / name, first) == tokenizer.beginning_of_document
        made_by = TokenizerCard.of(tokenizer)
    return Card(name=name, fingerprint=fingerprint(splits), splits=splits, tokenizer=made_by, **also)


def _first_id(prefix: Path, split: SplitCard) -> int:
    """Return the first token id of a split, -1 if it has none."""
    ids = np.fromfile(pair(prefix)[0], dtype=split.dtype, count=min(1, split.tokens))
    return int(ids[0]) if len(ids) else -1

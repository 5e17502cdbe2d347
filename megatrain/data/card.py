"""The dataset's card: what a prepared folder contains, with checksums. Reads no tokens, imports no torch.

A prepared dataset is a folder `<data.dir>/<data.name>/` with `train.bin/.idx`, `heldout.bin/.idx` (if anything is held
out), `tokenizer/` and `card.json`. A split of several adopted pairs has `train_00000.bin/.idx` and so on instead.
The card is written last: a folder without one is not a dataset yet.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import xxhash

from megatrain.config import PrepareConfig, TrainConfig, own_dataset
from megatrain.config.flatten import flatten
from megatrain.config.values import as_text
from megatrain.data.indexed import IndexedWriter, hash_blocks, hash_file, loss_file, pair, read_header
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError, DataError
from megatrain.resilience.atomic_file import remove_abandoned, write_atomically

FORMAT = 1
CARD = own_dataset.CARD
SPLITS = ("train", "heldout")


@dataclass
class SplitCard:
    """One split: counts, and its files' sizes and hashes. `bytes` is its normalised text in UTF-8, None if unknown.

    `loss_hashes` are those of its `.loss`, if it has one. A split of several pairs has a card for each in `parts`, in
    the order in which they are read, and no hashes itself.
    """

    documents: int
    bytes: int | None
    tokens: int
    dtype: str
    bin_size: int
    idx_size: int
    idx_hash: str
    block_hashes: list[str]
    parts: list[SplitCard] = field(default_factory=list)
    loss_hashes: list[str] | None = None

    @property
    def bytes_in_loss(self) -> int | None:
        """Bytes of the text whose tokens count in the loss; None if unknown, as of conversations, where some count."""
        return None if self.loss_hashes else self.bytes

    def pairs(self, split: str) -> list[tuple[str, SplitCard]]:
        """Return the name and the card of each `.bin/.idx` pair of this split."""
        return [(f"{split}_{at:05d}", part) for at, part in enumerate(self.parts)] or [(split, self)]


@dataclass
class TokenizerCard:
    """The tokenizer that made the ids. Documents begin with `beginning_of_document` unless it is None."""

    kind: str
    fingerprint: str
    vocab_size: int
    end_of_document: int
    beginning_of_document: int | None = None

    @staticmethod
    def of(tokenizer: Tokenizer) -> TokenizerCard:
        """Return the card of a tokenizer whose `starts_with_bos` is that of the documents."""
        first = tokenizer.beginning_of_document if tokenizer.starts_with_bos else None
        return TokenizerCard(
            tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_document, first
        )


@dataclass
class Card:
    """The contents of `card.json`.

    `tokenizer` is None for foreign data whose tokenizer is unknown. `cleaning` has what each step of the recipe did, in
    order: the fields of `StepReport` without examples. `near_duplicates` has those of `NearDuplicates`, likewise, if
    they were looked for; `duplicate_passages` those of a `StepReport`, if repeated passages were cut out.
    """

    name: str
    fingerprint: str
    splits: dict[str, SplitCard]
    tokenizer: TokenizerCard | None
    source: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    cleaning: list[Any] = field(default_factory=list)
    near_duplicates: dict[str, Any] = field(default_factory=dict)
    duplicate_passages: dict[str, Any] = field(default_factory=dict)

    @property
    def has_pairs(self) -> bool:
        """Whether the documents are preference pairs (`data=pairs`)."""
        data = self.config.get("data")
        return isinstance(data, dict) and data.get("kind") == "pairs"

    format: int = FORMAT

    def pairs(self) -> list[tuple[str, SplitCard]]:
        """Return the name and the card of each `.bin/.idx` pair of the dataset."""
        return [named for split, card in self.splits.items() for named in card.pairs(split)]

    def save(self, folder: Path) -> None:
        """Write `card.json` and flush it to disk."""
        raw = asdict(self)
        for split in raw["splits"].values():
            for part in split["parts"]:
                del part["parts"], part["loss_hashes"]
            for name in ("parts", "loss_hashes"):
                if not split[name]:
                    del split[name]  # so that older versions read the card
        remove_abandoned(folder)
        write_atomically(folder / CARD, json.dumps(raw, indent=1, sort_keys=True) + "\n", durable=True)

    @staticmethod
    def load(folder: Path) -> Card:
        """Read `card.json`. Raises `DataError` if it is not a card."""
        path = folder / CARD
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise DataError(f"{path}: card format {raw['format']}; this version reads format {FORMAT}")
            raw["splits"] = {name: _split_card(split) for name, split in raw["splits"].items()}
            raw["tokenizer"] = TokenizerCard(**raw["tokenizer"]) if raw["tokenizer"] else None
            card = Card(**raw)
            pairs = [part for _, part in card.pairs()]
            _check_types(card, *card.splits.values(), *pairs, *([card.tokenizer] if card.tokenizer else []))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsADirectoryError) as error:
            raise DataError(f"{path}: not a dataset card ({error}); prepare the dataset again") from error
        if card.fingerprint != fingerprint(card.splits):
            raise DataError(f"{path}: its fingerprint does not match its own hashes: the card was edited or damaged")
        return card


def _split_card(raw: dict[str, Any]) -> SplitCard:
    return SplitCard(**raw | {"parts": [_split_card(part) for part in raw.get("parts", [])]})


def _check_types(*parts: Any) -> None:
    """Check each value's type against its field's, and that no count is negative. Raises TypeError or ValueError."""
    for part in parts:
        for name, kinds in _kinds(type(part)).items():  # type: ignore[arg-type]  # a class is hashable
            value = getattr(part, name)
            if type(value) not in kinds:
                raise TypeError(f"{name} is {value!r}")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name} is {value}")


@lru_cache
def _kinds(kind: type) -> dict[str, list[Any]]:
    """Return the types that each field of a card's class may have."""
    hints = {
        name: get_args(hint) if get_origin(hint) is UnionType else (hint,)
        for name, hint in get_type_hints(kind).items()
    }
    return {name: [get_origin(each) or each for each in found] for name, found in hints.items()}


def fingerprint(splits: dict[str, SplitCard]) -> str:
    """Return the dataset's identity: xxh3-128 over each pair's name, `.idx` hash, `.bin` size and all block hashes."""
    state = xxhash.xxh3_128()
    for name in sorted(splits):
        for pair_name, part in splits[name].pairs(name):
            state.update(f"{pair_name} {part.idx_hash} {part.bin_size} {' '.join(part.block_hashes)}\n".encode())
            if part.loss_hashes:
                state.update(f"{pair_name}.loss {' '.join(part.loss_hashes)}\n".encode())
    return state.hexdigest()


def card_of_written(writer: IndexedWriter, text_bytes: int) -> SplitCard:
    """Return the card of a split from its finished writer, which hashed the blocks while writing."""
    return SplitCard(
        documents=writer.num_documents,
        bytes=text_bytes,
        tokens=writer.num_tokens,
        dtype=writer.dtype.name,
        bin_size=writer.bin_path.stat().st_size,
        idx_size=writer.idx_path.stat().st_size,
        idx_hash=hash_file(writer.idx_path),
        block_hashes=writer.blocks.digests(),
        loss_hashes=writer.loss_blocks.digests() if writer.loss_blocks else None,
    )


def card_of_files(prefix: Path) -> SplitCard:
    """Return the card of an existing `.bin/.idx` pair; reads both files once to hash them."""
    header = read_header(prefix)
    bin_path, idx_path = pair(prefix)
    return SplitCard(
        documents=header.num_documents,
        bytes=None,
        tokens=header.num_tokens,
        dtype=header.dtype.name,
        bin_size=bin_path.stat().st_size,
        idx_size=idx_path.stat().st_size,
        idx_hash=hash_file(idx_path),
        block_hashes=hash_blocks(bin_path),
    )


def card_of_parts(parts: list[SplitCard]) -> SplitCard:
    """Return the card of a split that consists of several pairs."""
    sizes = [part.bytes for part in parts if part.bytes is not None]
    return SplitCard(
        documents=sum(part.documents for part in parts),
        bytes=sum(sizes) if len(sizes) == len(parts) else None,
        tokens=sum(part.tokens for part in parts),
        dtype=np.result_type(*(part.dtype for part in parts)).name,
        bin_size=sum(part.bin_size for part in parts),
        idx_size=sum(part.idx_size for part in parts),
        idx_hash="",
        block_hashes=[],
        parts=parts,
    )


def check_dataset(folder: Path) -> Card:
    """Check that a prepared dataset exists and that its files have the right sizes; return its card.

    Reads no tokens. Raises `ConfigError` if the folder or its card is missing, `DataError` if a file is missing or its
    size differs from what the card (or the `.idx`) says.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"data.name: no dataset at {folder}; make it with: megatrain prepare data=... data.name={folder.name}"
        )
    if not (folder / CARD).is_file():
        pairs = sorted(path.stem for path in folder.glob("*.idx"))
        if pairs:
            raise ConfigError(
                f"data.name: {folder} has .bin/.idx pairs ({', '.join(pairs)}) but no {CARD}; make one for foreign "
                f"Megatron data with: megatrain prepare data=megatron data.name={folder.name} data.paths=[<prefix>]"
            )
        raise ConfigError(f"data.name: {folder} is not a prepared dataset (it has no {CARD})")
    card = Card.load(folder)
    for name, split in card.pairs():
        prefix = folder / name
        header = read_header(prefix)
        sizes = dict(zip(pair(prefix), (split.bin_size, split.idx_size), strict=True))
        if split.loss_hashes:
            sizes[loss_file(prefix)] = split.tokens
        for path, size in sizes.items():
            if not path.is_file():
                raise DataError(f"{path}: no such file, but the card has it; copy or prepare the dataset again")
            if path.stat().st_size != size:
                raise DataError(
                    f"{path}: {path.stat().st_size} bytes, but the card says {size}: the file was changed or cut"
                )
        if header.num_tokens != split.tokens or header.dtype.name != split.dtype:
            raise DataError(
                f"{prefix}.idx: {header.num_tokens} {header.dtype} tokens, "
                f"but the card says {split.tokens} {split.dtype}"
            )
    return card


def made_by(card: Card) -> list[str]:
    """Return the words of `megatrain prepare` that read and clean the text of a dataset again, without its tokenizer.

    Empty if the card does not say, or if the ids came without text.
    """
    kind = card.config.get("data", {}).get("kind")
    if kind in (None, "megatron", "mixture", "demo"):
        return []
    default = flatten(asdict(PrepareConfig()))
    config = copy.deepcopy(card.config)
    for step in config.get("clean", {}).get("steps", []):
        for parameters in step.values():
            parameters.pop("digests", None)  # what its files held, which is no parameter
    words = [
        f"{key}={as_text(value)}"
        for key, value in flatten(config).items()
        if value != default.get(key, value)
        and key not in ("data.kind", "data.name")
        and not key.startswith("tokenizer.")
    ]
    return [f"data={kind}", *words]


def with_vocabulary(config: TrainConfig, card: Card, folder: Path) -> TrainConfig:
    """Return the config with `model.vocab_size` filled in; refuse one smaller than the tokenizer's vocabulary.

    Raises ConfigError.
    """
    vocab = card.tokenizer.vocab_size if card.tokenizer else None
    if config.model.vocab_size is None:
        if vocab is None:
            raise ConfigError(
                f"model.vocab_size is null and {folder} names no tokenizer to take it from; set model.vocab_size"
            )
        return replace(config, model=replace(config.model, vocab_size=vocab))
    if vocab is not None and vocab > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary of {folder}'s tokenizer, "
            f"{vocab}; set model.vocab_size={vocab} (or null) or prepare the data with another tokenizer"
        )
    return config

"""The dataset's card: what a prepared folder contains, with checksums. Reads no tokens, imports no torch.

A prepared dataset is a folder `<data.dir>/<data.name>/` with `train.bin/.idx`, `heldout.bin/.idx` (if anything is held
out), `tokenizer/` and `card.json`. The card is written last: a folder without one is not a dataset yet.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import xxhash

from megatrain.data.indexed import IndexedWriter, hash_blocks, hash_file, pair, read_header
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError, DataError
from megatrain.resilience.atomic_file import write_atomically

FORMAT = 1
CARD = "card.json"
SPLITS = ("train", "heldout")


@dataclass
class SplitCard:
    """One split: counts, and its files' sizes and hashes. `bytes` is its normalised text in UTF-8, None if unknown."""

    documents: int
    bytes: int | None
    tokens: int
    dtype: str
    bin_size: int
    idx_size: int
    idx_hash: str
    block_hashes: list[str]


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
    """The contents of `card.json`. `tokenizer` is None for foreign data whose tokenizer is unknown."""

    name: str
    fingerprint: str
    splits: dict[str, SplitCard]
    tokenizer: TokenizerCard | None
    source: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Write `card.json` and flush it to disk."""
        write_atomically(folder / CARD, json.dumps(asdict(self), indent=1, sort_keys=True) + "\n", durable=True)

    @staticmethod
    def load(folder: Path) -> Card:
        """Read `card.json`. Raises `DataError` if it is not a card."""
        path = folder / CARD
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise DataError(f"{path}: card format {raw['format']}; this version reads format {FORMAT}")
            raw["splits"] = {name: SplitCard(**split) for name, split in raw["splits"].items()}
            raw["tokenizer"] = TokenizerCard(**raw["tokenizer"]) if raw["tokenizer"] else None
            card = Card(**raw)
            _check_types(card, *card.splits.values(), *([card.tokenizer] if card.tokenizer else []))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IsADirectoryError) as error:
            raise DataError(f"{path}: not a dataset card ({error}); prepare the dataset again") from error
        if card.fingerprint != fingerprint(card.splits):
            raise DataError(f"{path}: its fingerprint does not match its own hashes: the card was edited or damaged")
        return card


def _check_types(*parts: Any) -> None:
    """Check each value's type against its field's, and that no count is negative. Raises TypeError or ValueError."""
    for part in parts:
        for name, hint in get_type_hints(type(part)).items():
            value, kinds = getattr(part, name), get_args(hint) if get_origin(hint) is UnionType else (hint,)
            if type(value) not in [get_origin(kind) or kind for kind in kinds]:
                raise TypeError(f"{name} is {value!r}")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{name} is {value}")


def fingerprint(splits: dict[str, SplitCard]) -> str:
    """Return the dataset's identity: xxh3-128 over each split's name, `.idx` hash, `.bin` size and block hashes."""
    state = xxhash.xxh3_128()
    for name in sorted(splits):
        split = splits[name]
        state.update(f"{name} {split.idx_hash} {split.bin_size} {' '.join(split.block_hashes)}\n".encode())
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


def check_dataset(folder: Path) -> Card:
    """Check that a prepared dataset exists and that its files have the right sizes; return its card.

    Reads no tokens. Raises `ConfigError` if the folder or its card is missing, `DataError` if a file is missing or its
    size differs from what the card (or the `.idx`) says.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"data.dir, data.name: no dataset at {folder}; "
            f"make it with: megatrain prepare data=... data.name={folder.name}"
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
    for name, split in card.splits.items():
        prefix = folder / name
        header = read_header(prefix)
        for path, size in zip(pair(prefix), (split.bin_size, split.idx_size), strict=True):
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

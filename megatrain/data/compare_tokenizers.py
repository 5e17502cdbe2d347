"""How many bytes of text a token holds, for several tokenizers, by source and language of the text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatrain.config import DataConfig
from megatrain.data.card import CARD, check_dataset
from megatrain.data.corpus.decoding import decode
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.record import BadRecordError, LeftOutError, Policy
from megatrain.data.corpus.sources import open_source
from megatrain.data.corpus.steps.language import Language
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.tokenizer import META, Tokenizer
from megatrain.data.tokenizer_loading import find_tokenizer, load_tokenizer
from megatrain.errors import ConfigError, DataError

_SHORT = 200
"""Characters of a text below which its language is a guess."""


@dataclass
class Group:
    """Texts of one source and language: documents, bytes of UTF-8, and the tokens of each tokenizer."""

    source: str
    language: str
    documents: int = 0
    num_bytes: int = 0
    tokens: list[int] = field(default_factory=list)

    def add(self, other: Group) -> None:
        """Add another group's figures."""
        self.documents += other.documents
        self.num_bytes += other.num_bytes
        self.tokens = [a + b for a, b in zip(self.tokens or [0] * len(other.tokens), other.tokens, strict=True)]


@dataclass
class Comparison:
    """The groups, in alphabetical order, all together, and the seconds that each tokenizer took."""

    names: list[str]
    groups: list[Group]
    total: Group
    seconds: list[float]


def open_tokenizer(path: str) -> tuple[str, Tokenizer]:
    """Load a tokenizer by the folder of a dataset, checkpoint or tokenizer, or by its file; return it with its name.

    Raises `ConfigError` if there is none, `DataError` if it is damaged.
    """
    folder = Path(path).expanduser()
    for place in (folder, folder / "tokenizer"):
        if (place / META).is_file():
            return path, load_tokenizer(place)
    kind = "sentencepiece" if folder.suffix == ".model" or (folder / "tokenizer.model").is_file() else "hf"
    try:
        return path, find_tokenizer(kind, path)
    except ConfigError as error:
        raise ConfigError(str(error).replace("tokenizer.path", "tokenizers", 1)) from error


def compare(
    path: str, tokenizers: list[tuple[str, Tokenizer]], text_column: str, bytes_per_source: int, languages: bool
) -> Comparison:
    """Encode up to `bytes_per_source` bytes of each source's text with each tokenizer.

    `path` is a prepared dataset, or files, a folder or a glob. A source is a folder directly in `path`, or else the
    suffix of a file. Raises `ConfigError` or `DataError`.
    """
    identify = Language() if languages else None
    found: dict[tuple[str, str], Group] = {}
    taken: dict[str, int] = {}
    seconds = [0.0] * len(tokenizers)

    def is_full(source: str) -> bool:
        return taken.get(source, 0) >= bytes_per_source

    for source, text in _texts(path, text_column, is_full):
        size = len(text.encode())
        taken[source] = taken.get(source, 0) + size
        document = Document(text, "")
        if identify and len(text) >= _SHORT:
            identify.apply(document)
        language = document.language or ""
        tokens = []
        for place, (_, tokenizer) in enumerate(tokenizers):
            start = time.perf_counter()
            tokens.append(len(tokenizer.encode(text)))
            seconds[place] += time.perf_counter() - start
        found.setdefault((source, language), Group(source, language)).add(Group(source, language, 1, size, tokens))
    if not found:
        raise DataError(f"{path}: there is no text to compare tokenizers on")
    total = Group("all", "")
    for group in found.values():
        total.add(group)
    return Comparison([name for name, _ in tokenizers], [found[key] for key in sorted(found)], total, seconds)


def _texts(path: str, text_column: str, is_full: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """Yield the source and the text of each document; bad records and empty ones are left out.

    A file is read no further once its source is full.
    """
    folder = Path(path).expanduser()
    if (folder / CARD).is_file():
        yield from _texts_of_dataset(folder, is_full)
        return
    try:
        source = open_source(DataConfig(name="texts", kind="files", paths=[path], text_column=text_column))
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.paths", "path", 1)) from error
    policy = Policy(text_column, "replace", "skip")
    for shard in source.shards():
        for file, listed in zip(shard.paths, shard.stamps, strict=False):  # licences have stamps as well
            name = _source_of(Path(file), folder)
            for record in () if is_full(name) else source.read(replace(shard, paths=(file,), stamps=(listed,))):
                if record.oversized or record.left_out:
                    continue
                try:
                    text = decode(record, policy).text
                except (BadRecordError, LeftOutError):
                    continue
                if text:
                    yield name, text
                if is_full(name):
                    break


def _source_of(file: Path, folder: Path) -> str:
    """Return the folder of a file directly in `folder`, or else the file's suffix."""
    inside = file.relative_to(folder).parts if file.is_relative_to(folder) else ()
    return inside[0] if len(inside) > 1 else file.suffix.removeprefix(".") or file.name


def _texts_of_dataset(folder: Path, is_full: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    card = check_dataset(folder)
    if not (folder / "tokenizer" / META).is_file():
        raise ConfigError(f"{folder}: has no tokenizer to decode its ids with; give the text that it was made of")
    tokenizer = load_tokenizer(folder / "tokenizer")
    for split in card.splits:
        for ids in IndexedDataset.open(folder, split).documents():
            if is_full(split):
                break
            if text := tokenizer.decode(ids.tolist()):
                yield split, text

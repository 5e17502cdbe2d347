"""Augment documents by other words for the same."""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatrain.config import key
from megatrain.data.corpus.augmentation import Augmentation
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.splitting import require_splitter, splitter
from megatrain.data.corpus.word_lists import digest_of
from megatrain.errors import ConfigError

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class ReplaceSynonyms(Augmentation):
    """Replace words of some documents by synonyms from a table of your own, English or Chinese.

    The table is a file with a word and its synonyms on each line, separated by tabs, or a `.json` with lists of
    synonyms by word. Case does not count: a synonym is written with a capital, or in capitals, as the word was. A
    Chinese word is replaced where jieba finds it as a word (`megatrain[corpus]`). Entries of several words or with
    digits are never found. A changed table makes another dataset.
    """

    name: ClassVar[str] = "replace_synonyms"
    table: str | None = key(None, "file of the synonyms, .tsv or .json; must be given")
    word_rate: float = key(0.2, "share of the words in the table to replace", minimum=0, maximum=1)

    def __post_init__(self) -> None:
        if self.table is None:
            raise ConfigError(
                "clean.steps: replace_synonyms.table: missing; give a file with a word and its synonyms on each line, "
                "separated by tabs"
            )
        try:
            digest = digest_of(self.table)
        except ConfigError as error:
            raise ConfigError(f"clean.steps: replace_synonyms.table: {error}") from error
        if any(_CJK.search(word) for word in _read(self.table, digest)):
            require_splitter("zh", "the cleaning step replace_synonyms")
        object.__setattr__(self, "_digest", digest)  # no parameter: what the file holds now

    def settings(self) -> dict[str, Any]:
        """Return the parameters, and the digest of the table."""
        return asdict(self) | {"digests": {self.table: self.__dict__["_digest"]}}

    def augmented(self, document: Document, draw: random.Random) -> str:
        """Return the text with some words replaced."""
        assert self.table is not None
        table, text = _read(self.table, self.__dict__["_digest"]), document.text
        written, before = [], 0
        for start, stop in _words(text):
            choices = table.get(text[start:stop].lower())
            if choices and draw.random() < self.word_rate:
                chosen = choices[int(draw.random() * len(choices))]
                written += [text[before:start], _like(text[start:stop], chosen)]
                before = stop
                document.count("words")
        return "".join([*written, text[before:]])


def _words(text: str) -> Iterator[tuple[int, int]]:
    """Yield where each word starts and stops; those of a run with Chinese characters are jieba's."""
    for match in _WORD.finditer(text):
        if not _CJK.search(match[0]):
            yield match.span()
            continue
        at = match.start()
        for word in splitter("zh").words(match[0]):
            at = text.index(word, at)
            yield at, at + len(word)
            at += len(word)


def _like(word: str, synonym: str) -> str:
    """Write a synonym with capitals as the word has them."""
    if len(word) > 1 and word.isupper():
        return synonym.upper()
    return synonym[:1].upper() + synonym[1:] if word[:1].isupper() else synonym


@functools.lru_cache(maxsize=4)
def _read(path: str, digest: str) -> dict[str, tuple[str, ...]]:
    """Read a table once in each process: synonyms by word in small letters. Raises ConfigError if it is none."""
    place = f"clean.steps: replace_synonyms.table={path}"
    try:
        content = Path(path).expanduser().read_text(encoding="utf-8-sig")  # Excel begins a file with the mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: not a text in UTF-8") from error
    table: dict[str, tuple[str, ...]] = {}
    for where, word, synonyms in _of_json(content, place) if path.lower().endswith(".json") else _of_lines(content):
        others = tuple(dict.fromkeys(other for other in synonyms if other and other.lower() != word.lower()))
        if not word or not others:
            raise ConfigError(f"{place}, {where}: expected a word and its synonyms, separated by tabs")
        if not all(map(_is_unicode, (word, *others))):
            raise ConfigError(f"{place}, {where}: has half of a surrogate pair, which is no character")
        table[word.lower()] = tuple(dict.fromkeys([*table.get(word.lower(), ()), *others]))
    if not table:
        raise ConfigError(f"{place}: has no words")
    if not any(map(_WORD.fullmatch, table)):
        raise ConfigError(f"{place}: no entry is a single word of letters, as {min(table)!r}, so none is ever found")
    return table


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8: JSON can spell halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_lines(content: str) -> Iterator[tuple[str, str, list[str]]]:
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            word, *synonyms = (part.strip() for part in line.split("\t"))
            yield f"line {number}", word, synonyms


def _of_json(content: str, place: str) -> Iterator[tuple[str, str, list[str]]]:
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{place}: expected an object with lists of synonyms by word")
    for word, synonyms in raw.items():
        if not isinstance(synonyms, list) or not all(isinstance(other, str) for other in synonyms):
            raise ConfigError(f"{place}: {word}: expected a list of words")
        yield f"word {word}", word.strip(), [other.strip() for other in synonyms]

"""Remove documents with a word of a list, as C4 does."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatrain.config import key
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.word_lists import digest_of, read_list
from megatrain.errors import ConfigError

_LISTS = Path(__file__).parent / "naughty_words.json"  # names its origin and its licence
LANGUAGES = (
    *("ar", "cs", "da", "de", "en", "eo", "es", "fa", "fi", "fil", "fr", "fr-CA-u-sd-caqc", "hi", "hu", "it", "ja"),
    *("kab", "ko", "nl", "no", "pl", "pt", "ru", "sv", "th", "tlh", "tr", "zh"),
)
_WITHOUT_SPACES = ("ja", "th", "zh")
_EXEMPT = frozenset({"sm", "グロ", "女の子", "性"})  # C4's: parts of ordinary words where there are no spaces
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class BlockedWords(Step):
    """Remove documents that have a word of a list: C4's rule (Raffel et al. 2020, arXiv 1910.10683, 2.2).

    The list of a language is the one that C4 names, the "List of Dirty, Naughty, Obscene, and Otherwise Bad Words"
    (CC-BY-4.0, the npm package naughty-words 1.2.0), without the four entries that C4 exempts because they are parts of
    ordinary Chinese or Japanese words. A list of your own (`path`) has a word or phrase a line, or is an array in a
    `.json`. Case does not count, so entries in capitals, which C4's program never finds, are found. A word must stand
    on its own, but not in Chinese, Japanese and Thai, which have no spaces. A document that the step `language` found
    to be in another language stays, as in mC4.
    """

    name: ClassVar[str] = "blocked_words"
    language: str = key("en", "language of the words, such as en, zh or fr; 28 have a list")
    path: str | None = key(None, "file of the words; null for the list of the language")

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise ConfigError(
                f"clean.steps: blocked_words.language={self.language} has no list; give one of {', '.join(LANGUAGES)}"
            )
        try:
            digest = digest_of(self.path) if self.path else None
        except ConfigError as error:
            raise ConfigError(f"clean.steps: blocked_words.path: {error}; give a file with a word a line") from error
        object.__setattr__(self, "_digest", digest)  # no parameter: what the file holds now

    def settings(self) -> dict[str, Any]:
        """Return the parameters, and the digest of the list of one's own."""
        return asdict(self) | ({"digests": {self.path: self.__dict__["_digest"]}} if self.path else {})

    def apply(self, document: Document) -> Removal | None:
        """Look for the words."""
        if document.language not in (None, self.language.partition("-")[0]):
            return None
        found = _find(document.text.lower(), *_words(self.language, self.path, self.__dict__["_digest"]))
        return Removal("blocked_word", f"has {found}") if found else None


def _find(text: str, words: frozenset[str], phrases: tuple[str, ...], pattern: re.Pattern[str] | None) -> str | None:
    """Return a word or phrase of the lists that is in a text of small letters.

    `words` have no other characters than those of words, so they are looked up; `phrases` are searched for, those in
    spaced text with a `pattern` that wants them to stand on their own.
    """
    if words and (found := words.intersection(_WORD.findall(text))):
        return min(found)
    inside = next((phrase for phrase in phrases if phrase in text), None)  # a hundred times faster than the pattern
    if inside is None or pattern is None:
        return inside
    match = pattern.search(text)
    return match[0] if match else None


@functools.lru_cache(maxsize=8)
def _words(
    language: str, path: str | None, digest: str | None
) -> tuple[frozenset[str], tuple[str, ...], re.Pattern[str] | None]:
    """Return the arguments of `_find` for a list."""
    entries = read_list(path) if path else json.loads(_LISTS.read_text(encoding="utf-8"))["words"][language]
    listed = {unicodedata.normalize("NFC", entry).lower() for entry in entries} - (frozenset() if path else _EXEMPT)
    if language in _WITHOUT_SPACES:
        return frozenset(), tuple(sorted(listed)), None
    words = frozenset(entry for entry in listed if _WORD.fullmatch(entry))
    phrases = tuple(sorted(listed - words))
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, phrases))})(?!\w)") if phrases else None
    return words, phrases, pattern

"""Split text into words and sentences as spaCy does in English, and jieba in Chinese. Imports neither until it is used.

The published heuristics count words, and the splitter is part of the rule: other words give other verdicts. spaCy is
slow, but it splits each run of characters without whitespace on its own. So its result for a run is kept and used
again, which gives the same words several times faster.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from itertools import chain, pairwise
from typing import Any, Protocol

from megatrain.data.corpus.characters import SENTENCE_ENDS
from megatrain.data.corpus.document import Document
from megatrain.errors import EnvironmentFault, how_to_install

LANGUAGES = ("en", "zh")
"""Languages with a splitter."""

_MOST_RUNS = 2**17  # runs whose words are kept; some 30 MB
_LONGEST_RUN = 64  # characters of a run that is kept
_GAP = "\ud800"  # stands for a space inside a run; UTF-8 has no such character, so no text does
_CHINESE_ENDS = "。！？；!?…"
_CHINESE_SENTENCE = re.compile(rf"[^{_CHINESE_ENDS}\s][^{_CHINESE_ENDS}]*")
_RUN = re.compile(r"(\S+)(\s*)")


class Splitter(Protocol):
    """Splits text of one language."""

    def words(self, text: str) -> list[str]:
        """Return the words and punctuation marks, without whitespace."""

    def sentences(self, text: str) -> int:
        """Return the number of sentences, at least 1."""


class English:
    """spaCy's rules for English (`spacy.blank("en")` with the `sentencizer`), with its result for each run kept."""

    def __init__(self) -> None:
        import spacy

        complete = spacy.blank("en").tokenizer
        self._tokenizer = _copy(complete, complete.rules)
        self._runs: dict[str, tuple[str, ...]] = {}
        self._pairs = _pairs_of_exceptions(complete)
        firsts: dict[bool, set[str]] = {True: set(), False: set()}
        for last, first in self._pairs:
            firsts[_is_letter(last)].add(first)
        after_letter, after_mark = ("".join(map(re.escape, sorted(firsts[is_letter]))) for is_letter in (True, False))
        marks = "".join(re.escape(last) for last in sorted({last for last, _ in self._pairs}) if not _is_letter(last))
        self._gap = re.compile(rf" (?:(?<=[^\W\d_] )(?=[{after_letter}])|(?<=[{marks}] )(?=[{after_mark}]))")

    def words(self, text: str) -> list[str]:
        """Return the words and punctuation marks, without whitespace."""
        return self._words_of_runs(self._gap.sub(self._mark_gap, text).split())

    def sentences(self, text: str) -> int:
        """Return the number of sentences, at least 1."""
        found, ended = 1, False
        for run, space in _RUN.findall(self._gap.sub(self._mark_gap, text)):
            for word in self._words_of_runs([run]):
                ends = word in SENTENCE_ENDS
                if ended and not ends and not _is_punctuation(word):
                    found, ended = found + 1, False
                elif ends:
                    ended = True
            if ended and space not in ("", " "):  # a longer space is a token of its own
                found, ended = found + 1, False
        return found

    def _words_of_runs(self, runs: list[str]) -> list[str]:
        unknown = set(runs).difference(self._runs)
        if unknown:
            if len(self._runs) > _MOST_RUNS:
                self._runs.clear()
                unknown = set(runs)
            self._learn(unknown)
        words = list(chain.from_iterable(map(self._runs.__getitem__, runs)))
        for run in unknown:
            if len(run) > _LONGEST_RUN:
                del self._runs[run]
        return words

    def _learn(self, runs: Iterable[str]) -> None:
        """Let spaCy split runs, all in one call, a line each."""
        runs = list(runs)
        text = "\n".join(runs).replace(_GAP, " ")
        # spaCy fails on the token IS_ALPHA, the name of its own attribute 1, so it splits another word in its place.
        given = text.replace("IS_ALPHA", "IS_ALPHB")
        words: list[list[str]] = [[]]
        with self._tokenizer.vocab.memory_zone():
            found = self._tokenizer(given).to_array(["IDX", "LENGTH"]).tolist()
        for start, length in found:
            word = text[start : start + length]
            if word == "\n":
                words.append([])
            else:
                words[-1].append(word)
        self._runs.update(zip(runs, map(tuple, words), strict=True))

    def _mark_gap(self, match: re.Match[str]) -> str:
        """Keep the runs around a space together if an exception of spaCy's rules could match across it.

        spaCy finds exceptions such as `:)` in the tokens, whatever whitespace is between them. One across two runs
        changes nothing itself, but hides a shorter one inside a run.
        """
        text, place = match.string, match.start()
        for left, right in self._pairs[text[place - 1], text[place + 1]]:
            end = place + 1 + len(right)
            if (
                text.endswith(left, 0, place)
                and text.startswith(right, place + 1)
                and not (_is_letter(left[0]) and _is_letter(text[place - len(left) - 1 : place - len(left)]))
                and not (_is_letter(right[-1]) and _is_letter(text[end : end + 1]))
            ):
                return _GAP
        return " "


def _copy(tokenizer: Any, rules: dict[str, Any]) -> Any:
    """Return the tokenizer with other exceptions and a vocabulary of bare words, without their shapes and so on.

    Those have no part in how text is split, and take most of the time.
    """
    from spacy.vocab import Vocab

    return type(tokenizer)(
        Vocab(),
        rules=rules,
        prefix_search=tokenizer.prefix_search,
        suffix_search=tokenizer.suffix_search,
        infix_finditer=tokenizer.infix_finditer,
        token_match=tokenizer.token_match,
        url_match=tokenizer.url_match,
    )


class _Pairs(dict[tuple[str, str], list[tuple[str, str]]]):
    def __missing__(self, key: tuple[str, str]) -> list[tuple[str, str]]:
        return []


def _pairs_of_exceptions(tokenizer: Any) -> _Pairs:
    """Return pairs of neighbouring tokens in exceptions, by the last character of one and the first of the other."""
    plain = _copy(tokenizer, {})
    pairs = _Pairs()
    for exception in tokenizer.rules:
        tokens = [token.text for token in plain(exception)]
        for left, right in pairwise(tokens):
            found = pairs.setdefault((left[-1], right[0]), [])
            if (left, right) not in found:
                found.append((left, right))
    return pairs


class Chinese:
    """jieba's words (accurate mode, with its model for unknown words); a sentence ends at `。！？；…` and the like."""

    def __init__(self) -> None:
        import jieba

        self._tokenizer = jieba.Tokenizer()
        # Not `initialize()`: that reads a cache from a folder that everybody can write to.
        self._tokenizer.FREQ, self._tokenizer.total = self._tokenizer.gen_pfdict(self._tokenizer.get_dict_file())
        self._tokenizer.initialized = True

    def words(self, text: str) -> list[str]:
        """Return the words and punctuation marks, without whitespace."""
        return [word for piece in self._tokenizer.cut(text) if (word := piece.strip())]

    def sentences(self, text: str) -> int:
        """Return the number of sentences, at least 1."""
        return max(1, len(_CHINESE_SENTENCE.findall(text)))


_SPLITTERS: dict[str, tuple[str, type[Splitter]]] = {"en": ("spacy", English), "zh": ("jieba", Chinese)}


@cache
def splitter(language: str) -> Splitter:
    """Return the splitter of a language, one a process. Its memory has no influence on what it returns."""
    return _SPLITTERS[language][1]()


def require_splitter(language: str, what: str) -> None:
    """Raise `EnvironmentFault` if the library of a language's splitter is not installed; `what` needs it."""
    library = _SPLITTERS[language][0]
    if find_spec(library) is None:
        raise EnvironmentFault(f"{what} splits words with the library {library}: {how_to_install('corpus')}")


def words_of(document: Document, language: str) -> list[str]:
    """Return the words of a document's text, split once until the text changes. Not to be changed."""
    known = document.split
    if known is None or known[0] is not document.text or known[1] != language:
        known = document.split = (document.text, language, splitter(language).words(document.text))
    return known[2]


def _is_letter(text: str) -> bool:
    return text[:1].isalpha()


def _is_punctuation(word: str) -> bool:
    return all(unicodedata.category(character)[0] == "P" for character in word)

"""Texts as words, as hashes of words and as hashes of word n-grams, many texts at a time. Opens no files.

A word is a run of letters, digits and marks; a Chinese or Japanese character is a word of its own. Case, accents and
full-width forms do not count. `split` says so word by word; `hash_words` is the same in array operations.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_SEPARATOR, _LETTER, _ALONE, _IGNORED = range(4)
_TABLED = 0x20000  # the characters from here on are Chinese, each a word
_PIECE = 2**16  # characters that are hashed at a time, so that they stay in the cache; a longer text is cut at a space
_CHARACTERS = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (_TABLED, _TABLED))
_WORD_FACTOR, _NGRAM_FACTOR = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F  # odd, so that they have inverses modulo 2^64
_WORD_INVERSE = pow(_WORD_FACTOR, -1, 2**64)


@dataclass(frozen=True)
class Words:
    """The words of texts: their hashes, where each is in its text (characters), and the words before each text.

    `hashes`, `starts` and `stops` have one entry a word; `offsets` has one a text, and the number of words at its end.
    """

    hashes: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    offsets: np.ndarray


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return the kind of each character below `_TABLED` (and one for all others), and the character it is folded to."""
    kinds = np.zeros(_TABLED + 1, np.uint8)
    folded = np.arange(_TABLED + 1, dtype=np.uint32)
    for point in range(_TABLED):
        if 0xD800 <= point < 0xE000:
            continue
        category = unicodedata.category(chr(point))
        if 0x300 <= point <= 0x36F:
            kinds[point] = _IGNORED
        elif category[0] in "LNM":
            kinds[point] = _LETTER
            base = unicodedata.normalize("NFKD", chr(point))
            marks = all(0x300 <= ord(letter) <= 0x36F for letter in base[1:])
            lower = (base[0] if marks else chr(point)).lower()
            folded[point] = ord(lower[0])
    for first, last in _CHARACTERS:
        kinds[first : last + 1] = np.where(kinds[first : last + 1] == _LETTER, _ALONE, kinds[first : last + 1])
    kinds[_TABLED] = _ALONE
    return kinds, folded


def split(text: str) -> list[str]:
    """Return the words of a text, folded."""
    kinds, folded = _tables()
    words = []
    word = ""
    for letter in text:
        point = ord(letter)
        kind = kinds[min(point, _TABLED)]
        if kind == _IGNORED:
            continue
        if kind != _LETTER and word:
            words.append(word)
            word = ""
        if kind == _LETTER:
            word += chr(folded[point])
        elif kind == _ALONE:
            words.append(chr(folded[point]) if point < _TABLED else letter)
    return [*words, word] if word else words


def hash_words(texts: Sequence[str]) -> Words:
    """Return the words of texts, hashed."""
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    counts = np.zeros(len(texts) + 1, np.int64)
    for batch in _batches(texts):
        joined = "\n".join(text for _, _, text in batch)
        hashes, starts, stops = _hash(joined)
        lengths = np.array([len(text) + 1 for _, _, text in batch], np.int64)
        begins = np.cumsum(lengths) - lengths
        per_piece = np.diff(np.searchsorted(starts, begins), append=len(starts))
        shift = np.repeat(np.array([at for _, at, _ in batch], np.int64) - begins, per_piece)
        found.append((hashes, starts + shift, stops + shift))
        np.add.at(counts, np.array([number + 1 for number, _, _ in batch]), per_piece)
    if not found:
        return Words(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64), counts)
    hashes, starts, stops = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return Words(hashes, starts, stops, np.cumsum(counts))


def _batches(texts: Sequence[str]) -> Iterator[list[tuple[int, int, str]]]:
    """Yield pieces of texts, at most `_PIECE` characters at a time: the text's number, where the piece is, the piece.

    Where a text is cut depends on that text alone.
    """
    batch: list[tuple[int, int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        for at, piece in _pieces(text):
            if batch and size + len(piece) > _PIECE:
                yield batch
                batch, size = [], 0
            batch.append((number, at, piece))
            size += len(piece)
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    at = 0
    while len(text) - at > _PIECE:
        cut = text.rfind(" ", at, at + _PIECE) + 1
        cut = cut if cut > at else at + _PIECE
        yield at, text[at:cut]
        at = cut
    yield at, text[at:] if at else text


def _hash(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashes of a text's words, and where each begins and ends.

    A word's hash is a polynomial in its characters, mixed. Powers are counted from the beginning of the text, which is
    the same for every word, and divided by that of the word's first character.
    """
    places = None  # of the characters that are left, if some are ignored
    if text.isascii():
        values: np.ndarray = np.frombuffer(text.encode().translate(_ascii_values()), np.uint8)
        alone = None
    else:
        kind_of, folded_of = _tables()
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
        capped = np.minimum(points, _TABLED).astype(np.intp)
        kinds = kind_of[capped]
        if (kinds == _IGNORED).any():
            places = np.flatnonzero(kinds != _IGNORED)
            points, capped, kinds = points[places], capped[places], kinds[places]
        values = np.where(capped < _TABLED, folded_of[capped], points) + np.uint32(1)
        values[kinds == _SEPARATOR] = 0
        alone = kinds == _ALONE
    in_word = values != 0
    joined = in_word[1:] & in_word[:-1]  # each character but the first: whether it continues a word
    if alone is not None:
        joined &= ~(alone[1:] | alone[:-1])
    begins, ends = in_word.copy(), in_word.copy()
    begins[1:] &= ~joined
    ends[:-1] &= ~joined
    starts, stops = np.flatnonzero(begins), np.flatnonzero(ends) + 1
    if not len(starts):
        return np.zeros(0, np.uint64), starts, stops
    size = 1 << (len(values) - 1).bit_length()
    terms = values * _powers(_WORD_FACTOR, size)[: len(values)]
    hashes = mix(np.add.reduceat(terms, starts) * _powers(_WORD_INVERSE, size)[starts])
    if places is not None:
        starts, stops = places[starts], places[stops - 1] + 1
    return hashes, starts, stops


@functools.cache
def _ascii_values() -> bytes:
    """Return the value of each byte of ASCII: that of the folded letter or digit, plus 1, or 0."""
    letters = bytes(range(128)).lower()
    return bytes(letter + 1 if chr(letter).isalnum() else 0 for letter in letters) + bytes(128)


@functools.lru_cache(maxsize=64)
def _powers(factor: int, count: int) -> np.ndarray:
    """Return the powers of a factor from 0 on, modulo 2^64."""
    powers = np.full(count, factor, np.uint64)
    powers[0] = 1
    accumulated: np.ndarray = np.multiply.accumulate(powers)
    return accumulated


def mix(values: np.ndarray) -> np.ndarray:
    """Return 64-bit values mixed by the finaliser of SplitMix64, which is a bijection."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def hash_ngrams(words: Words, size: int, short: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of the word n-grams of texts, in order, and how many come before each text (and at the end).

    A text of fewer than `size` words has none or, with `short`, one: all its words (none if it has none).
    """
    counts = np.diff(words.offsets)
    ngrams = np.maximum(counts - size + 1, ((counts > 0) & short).astype(np.int64))
    offsets = np.concatenate([[0], np.cumsum(ngrams)])
    # n-gram k of a text begins at its word k
    at = np.arange(offsets[-1]) + np.repeat(words.offsets[:-1] - offsets[:-1], ngrams)
    left = np.repeat(words.offsets[1:], ngrams) - at
    hashes = np.zeros(len(at), np.uint64)
    for place, power in enumerate(_powers(_NGRAM_FACTOR, size)):
        within = left > place
        if within.all():
            hashes += words.hashes[at + place] * power
        else:
            hashes[within] += words.hashes[at[within] + place] * power
    return mix(hashes), offsets

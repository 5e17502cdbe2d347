"""Words and n-grams in array operations are those of the plain reference, word by word."""

import random

import numpy as np
import pytest

from megatrain.data.corpus import words
from megatrain.data.corpus.words import hash_ngrams, hash_words, split

WIDE = "".join(chr(ord(letter) + 0xFEE0) for letter in "full") + " width"
TEXTS = [
    "The quick, brown fox; the QUICK fox!",
    "",
    " \n\t... -- ",
    f"Élan vital, e\u0301lan VITAL, {WIDE}",
    "我们的模型 uses 中文 and かな, 12字3",
    "हिन्दी भाषा ไทย ภาษา עִבְרִית",
    "snake_case x1 3.14 \U00020000\U00020001 \U0001d400",
    "\u0301leading mark",
    "a",
]


def reference_ngrams(text, size):
    found = split(text)
    if found and len(found) < size:
        return [tuple(found)]
    return [tuple(found[at : at + size]) for at in range(len(found) - size + 1)]


def test_words_are_folded_and_characters_of_chinese_stand_alone():
    assert split(TEXTS[0]) == ["the", "quick", "brown", "fox", "the", "quick", "fox"]
    assert split(TEXTS[3]) == ["elan", "vital", "elan", "vital", "full", "width"]
    assert split(TEXTS[4]) == [*"我们的模型", "uses", *"中文", "and", *"かな", "12", "字", "3"]
    assert split(TEXTS[6])[:6] == ["snake", "case", "x1", "3", "14", "\U00020000"]


def letters(seed, count):
    random_ = random.Random(seed)
    return "".join(random_.choices("abé\u0301Ä中国 \n,.字\U00020000_9ß", k=count))


@pytest.mark.parametrize("piece", [2**20, 40])
def test_equal_hashes_mean_equal_words_and_places_are_the_words_own(monkeypatch, piece):
    monkeypatch.setattr(words, "_PIECE", piece)
    texts = [*TEXTS, *(letters(seed, 35) for seed in range(300))]
    found = hash_words(texts)
    named = {}
    for number, text in enumerate(texts):
        here = slice(found.offsets[number], found.offsets[number + 1])
        assert here.stop - here.start == len(split(text)), text
        for word, digest, start, stop in zip(
            split(text), found.hashes[here], found.starts[here], found.stops[here], strict=True
        ):
            assert split(text[start:stop]) == [word]
            assert named.setdefault(word, digest) == digest
    assert len(set(named.values())) == len(named) > 250


@pytest.mark.parametrize("size", [1, 3, 5])
def test_equal_ngrams_have_equal_hashes_and_different_ones_do_not(size):
    texts = [*TEXTS, *(letters(seed, 60) for seed in range(100)), "a b", "b a"]
    hashes, offsets = hash_ngrams(hash_words(texts), size, short=True)
    named = {}
    for number, text in enumerate(texts):
        here = hashes[offsets[number] : offsets[number + 1]]
        for ngram, digest in zip(reference_ngrams(text, size), here.tolist(), strict=True):
            assert named.setdefault(ngram, digest) == digest
    assert len(set(named.values())) == len(named)
    _, without = hash_ngrams(hash_words(texts), size, short=False)
    assert np.diff(without).tolist() == [max(len(split(text)) - size + 1, 0) for text in texts]


def test_a_long_text_is_cut_at_a_space_and_is_the_same_beside_any_others(monkeypatch):
    text = " ".join(f"word{i}" for i in range(200))
    whole = hash_words([text])
    monkeypatch.setattr(words, "_PIECE", 50)
    for texts in ([text], ["one", text, "", text]):
        cut = hash_words(texts)
        here = slice(cut.offsets[texts.index(text)], cut.offsets[texts.index(text) + 1])
        assert (cut.hashes[here] == whole.hashes).all() and (cut.starts[here] == whole.starts).all()
    assert len(hash_words(["x" * 120]).hashes) == 3

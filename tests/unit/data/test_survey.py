"""The survey's figures are those counted by hand, in any number of strides, pairs and pieces."""

import dataclasses

import numpy as np
import pytest

from megatrain.data import survey
from megatrain.data.card import Card, card_of_parts, card_of_written, fingerprint
from megatrain.data.indexed import HEADER, IndexedWriter
from megatrain.data.survey import Lengths, count_lengths, count_tokens, sample_documents
from megatrain.errors import DataError


@pytest.fixture
def many(tmp_path):
    """Write a train split of two pairs of 3 and 2 documents and a held-out one; return the folder and its card.

    Document `i` of the dataset has `i + 1` tokens, all of them `i`.
    """

    def write(name, documents):
        writer = IndexedWriter(tmp_path / name, np.dtype(np.uint16))
        for i in documents:
            writer.add(np.full(i + 1, i, np.uint16), np.array([i + 1], np.int32))
        writer.finish()
        return card_of_written(writer, 10)

    train = card_of_parts([write("train_00000", [0, 1, 2]), write("train_00001", [3, 4])])
    splits = {"train": train, "heldout": write("heldout", [5])}
    card = Card("many", fingerprint(splits), splits, None)
    card.save(tmp_path)
    return tmp_path, Card.load(tmp_path)


def counted(lengths):
    found = Lengths()
    for some in lengths:
        found.add(np.array(some, np.int32))
    return found


def test_lengths_are_counted_by_doubling_and_quantiles_are_lengths():
    found = counted([[4, 1, 0], [], [3, 8, 2], [7]])
    assert found.bins() == [(0, 1, 0), (1, 1, 1), (2, 2, 5), (4, 2, 11), (8, 1, 8)]
    assert (found.documents, found.tokens, found.shortest, found.longest) == (7, 25, 0, 8)
    # in order 0 1 2 3 4 7 8: a half is the fourth, 90% is the seventh (6.3 rounded up)
    assert [found.quantile(share) for share in (0.0, 0.01, 0.5, 0.85, 0.9, 1.0)] == [0, 0, 3, 7, 8, 8]


def test_long_documents_keep_their_bin_and_quantiles_are_nearly_exact():
    found = counted([[2**16 - 1, 2**16, 2**17 - 1, 2**17, 2**31 - 1]])
    bins = {first: documents for first, documents, _ in found.bins() if documents}
    assert bins == {2**15: 1, 2**16: 2, 2**17: 1, 2**30: 1}
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(2**16, 2**24, 999))
    found = counted([lengths])
    for share in (0.1, 0.5, 0.99):
        exact = lengths[int(np.ceil(share * 999)) - 1]
        assert exact / 1.011 <= found.quantile(share) <= exact


@pytest.mark.parametrize("stride", [1, 2, 2**20])
def test_lengths_and_tokens_of_all_pairs_are_counted(many, stride, monkeypatch):
    monkeypatch.setattr(survey, "_STRIDE", stride)
    folder, card = many
    lengths = count_lengths(folder, card)
    assert lengths.bins() == [(1, 1, 1), (2, 2, 5), (4, 3, 15)] and lengths.documents == 6
    found = count_tokens(folder, card)
    assert found.counts[:7].tolist() == [1, 2, 3, 4, 5, 6, 0] and (found.counted, found.tokens) == (21, 21)


def test_a_large_dataset_is_counted_in_evenly_spaced_pieces(many, monkeypatch):
    monkeypatch.setattr(survey, "_STRIDE", 1)
    monkeypatch.setattr(survey, "_MAX_PIECES", 3)
    found = count_tokens(*many)
    # the 1st, 8th and 15th of 21 tokens: held out 5 5 5 5 5 5, then 0 1 1 2 2 2 3 3 3 3 and so on
    assert (found.counted, found.tokens) == (3, 21) and np.flatnonzero(found.counts).tolist() == [1, 3, 5]


def test_ids_outside_the_vocabulary_are_counted_apart(many):
    folder, card = many
    known = dataclasses.make_dataclass("Known", ["vocab_size"])(3)
    card.tokenizer = known
    found = count_tokens(folder, card)
    assert found.counts.tolist() == [1, 2, 3] and found.beyond == 4 + 5 + 6


def test_random_documents_are_those_of_the_seed_with_their_places(many):
    folder, card = many
    every = list(sample_documents(folder, card, 100, seed=0, max_tokens=3))
    assert sorted((s.split, s.number, s.length, len(s.ids), *set(s.ids)) for s in every) == [
        ("heldout", 0, 6, 3, 5),
        ("train", 0, 1, 1, 0),
        ("train", 1, 2, 2, 1),
        ("train", 2, 3, 3, 2),
        ("train", 3, 4, 3, 3),
        ("train", 4, 5, 3, 4),
    ]
    drawn = {seed: list(sample_documents(folder, card, 2, seed, 9)) for seed in range(20)}
    assert drawn[1] == list(sample_documents(folder, card, 2, 1, 9)) and len(drawn[1]) == 2
    assert {s.length for samples in drawn.values() for s in samples} == set(range(1, 7)), "each has its chance"


def test_damage_is_refused_by_file(many):
    folder, card = many
    idx = bytearray((folder / "heldout.idx").read_bytes())
    idx[HEADER.size : HEADER.size + 4] = np.array([-1], "<i4").tobytes()
    (folder / "heldout.idx").write_bytes(idx)
    with pytest.raises(DataError, match=r"heldout\.idx: damaged: a document has -1 tokens"):
        count_lengths(folder, card)
    with pytest.raises(DataError, match=r"heldout\.idx: damaged at document 0"):
        list(sample_documents(folder, card, 6, 0, 9))
    (folder / "train_00001.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"train_00001\.bin: ends at token 1"):
        count_tokens(folder, card)

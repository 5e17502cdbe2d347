"""Best-fit packing: nothing lost, no document cut that fits, and the bins of the textbook's algorithm."""

from bisect import bisect_left, insort

import numpy as np
import pytest

from megatrain.data.packing import BEGINS, ENDS, best_fit, cut


def textbook(lengths, capacity):
    """Return the rooms left by best-fit decreasing, one item at a time."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else capacity
        insort(rooms, room - length)
    return rooms


def rooms_of(lengths, capacity):
    items, ends = best_fit(lengths, capacity)
    assert np.array_equal(np.sort(items), np.arange(len(lengths)))
    bins = np.split(lengths[items], ends[:-1])
    assert all(len(items_of_bin) for items_of_bin in bins)
    return sorted(capacity - int(items_of_bin.sum()) for items_of_bin in bins)


@pytest.mark.parametrize("capacity", [1, 2, 7, 33, 129])
@pytest.mark.parametrize("count", [1, 2, 40, 700])
def test_the_bins_are_those_of_best_fit_decreasing(capacity, count):
    random = np.random.default_rng(capacity * count)
    for lengths in (
        random.integers(1, capacity + 1, count),
        np.minimum(capacity, random.lognormal(2, 1, count).astype(np.int64) + 1),
        np.full(count, max(1, capacity // 3)),
    ):
        assert rooms_of(lengths, capacity) == textbook(lengths.tolist(), capacity)


def test_many_documents_fill_their_samples_almost_wholly():
    """As measured in the paper: padding is a matter of the last samples. One after another, 15% would be padding."""
    lengths = np.minimum(2049, np.random.default_rng(0).lognormal(6, 1.1, 20_000).astype(np.int64) + 1)
    _, ends = best_fit(lengths, 2049)
    assert lengths.sum() / (len(ends) * 2049) > 0.999


def test_a_capacity_of_more_than_16_bits_sorts_rightly():
    lengths = np.array([3, 70_000, 66_000, 4_000, 2**16])
    items, ends = best_fit(lengths, 70_000)
    assert [lengths[bin_items].tolist() for bin_items in np.split(items, ends[:-1])] == [
        [70_000],
        [66_000, 4_000],
        [2**16, 3],
    ]


def test_no_items_need_no_bins():
    items, ends = best_fit(np.empty(0, np.int64), 8)
    assert len(items) == len(ends) == 0


def test_each_token_of_a_cut_document_but_the_first_is_a_label_once():
    """Documents of every length around the multiples of a sample's."""
    seq_len = 8
    lengths = np.arange(0, 40)
    pieces = cut(lengths, 1000, seq_len)
    starts = 1000 + np.cumsum(lengths) - lengths
    assert (pieces["flags"] & BEGINS > 0).sum() == (pieces["flags"] & ENDS > 0).sum() == 39  # not the empty one
    for start, length in zip(starts[1:], lengths[1:], strict=True):
        own = pieces[(pieces["start"] >= start) & (pieces["start"] < start + length)]
        labels = [np.arange(p["start"] + 1, p["start"] + p["length"]) for p in own]
        assert np.concatenate(labels).tolist() == list(range(start + 1, start + length))
        assert own["length"].max() <= seq_len + 1 and (length > seq_len + 1 or len(own) == 1)
        assert own[0]["flags"] & BEGINS and own[-1]["flags"] & ENDS
        assert (own["flags"][1:] & BEGINS == 0).all() and (own["flags"][:-1] & ENDS == 0).all()

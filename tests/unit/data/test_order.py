"""The order of samples: a bijection in every epoch, cheap at any size, and cursors that skip ranges."""

import tracemalloc

import numpy as np
import pytest

from megatrain.data.order import SampleOrder, cursor_after, merge_ranges, permute, take
from megatrain.data.samples import num_windows


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 1023, 1024, 1025, 4096, 9973, 65536, 100003])
def test_an_epoch_visits_every_window_exactly_once(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, f"key {n}")), np.arange(n))


@pytest.mark.parametrize("n", [2**31 - 1, 2**40 + 3, 10**12 // 2048, 10**15])
def test_large_epochs_stay_in_range_and_never_collide(n):
    index = np.unique(np.random.default_rng(n).integers(0, n, 20000))
    windows = permute(index, n, "key")
    assert windows.min() >= 0 and windows.max() < n
    assert len(np.unique(windows)) == len(index)


def test_the_order_is_the_documented_one():
    """Recorded values: another order under the same dataset and seed would silently break every resumed run."""
    order = SampleOrder("0123456789abcdef0123456789abcdef", "train", 8, 124, 1234)
    assert order.windows(np.arange(8)).tolist() == [90, 63, 27, 114, 32, 107, 20, 72]


def test_any_sample_can_be_computed_alone_in_any_epoch():
    order = SampleOrder("f", "train", 16, 50, 3)
    run = order.windows(np.arange(175))
    assert np.array_equal(order.windows(np.array([49, 50, 174, 0, 101])), run[[49, 50, 174, 0, 101]])
    for epoch in range(3):
        assert np.array_equal(np.sort(run[50 * epoch : 50 * epoch + 50]), np.arange(50))
    assert order.windows(np.arange(6).reshape(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("other", [("g", "train", 16, 3), ("f", "heldout", 16, 3), ("f", "train", 16, 4)])
def test_dataset_split_and_seed_each_change_the_order(other):
    fingerprint, split, seq_len, seed = other
    base = SampleOrder("f", "train", 16, 999, 3).windows(np.arange(500))
    assert np.mean(base == SampleOrder(fingerprint, split, seq_len, 999, seed).windows(np.arange(500))) < 0.02


def test_epochs_are_shuffled_differently_from_one_another():
    windows = SampleOrder("f", "train", 16, 500, 3).windows(np.arange(1000)).reshape(2, 500)
    assert np.mean(windows[0] == windows[1]) < 0.02


def test_the_order_looks_random():
    """Like a uniform permutation, over 50 keys: fixed points (1 expected a key), steps of +1, correlation with the
    index, and how evenly the first eighth of an epoch covers the eighths of the data (chi-square, 7 degrees)."""
    n, fixed, adjacent, correlations, chi = 4000, 0, 0, [], []
    for key in range(50):
        windows = permute(np.arange(n), n, f"{key}")
        fixed += int(np.sum(windows == np.arange(n)))
        adjacent += int(np.sum(np.diff(windows) == 1))
        correlations.append(np.corrcoef(windows, np.arange(n))[0, 1])
        counts = np.bincount(windows[: n // 8] * 8 // n, minlength=8)
        chi.append(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert 25 <= fixed <= 80 and 25 <= adjacent <= 80
    assert np.abs(correlations).max() < 5 / np.sqrt(n)
    assert 4.5 < np.mean(chi) < 8.5  # 7 times 7/8 (drawn without replacement) = 6.1 expected


def test_every_order_of_three_windows_occurs_about_as_often():
    """Tiny epochs are the hard case of a Feistel network."""
    seen = np.zeros(27)
    for key in range(3000):
        seen[int(permute(np.arange(3), 3, str(key)) @ [9, 3, 1])] += 1
    counts = seen[seen > 0]
    assert len(counts) == 6 and counts.min() > 410 and counts.max() < 590


def test_an_epoch_over_a_trillion_tokens_opens_in_little_memory():
    tracemalloc.start()
    order = SampleOrder("f", "train", 2048, 10**12 // 2048, 1)
    order.windows(np.arange(4096, dtype=np.int64) + 3 * order.samples_per_epoch - 2000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_the_last_partial_window_is_dropped_and_too_short_a_split_refused():
    assert [num_windows(tokens, 10) for tokens in (0, 1, 10, 11, 20, 21)] == [0, 0, 0, 1, 1, 2]
    with pytest.raises(ValueError, match="no sample of 10"):
        SampleOrder("f", "train", 10, num_windows(10, 10), 0)


def slow_take(cursor, count, ranges):
    taken = []
    while len(taken) < count:
        if not any(start <= cursor < stop for start, stop in ranges):
            taken.append(cursor)
        cursor += 1
    return taken, cursor


def test_steps_skip_ranges_like_a_walk_sample_by_sample():
    rng = np.random.default_rng(5)
    for _ in range(500):
        ranges = [(int(a), int(a + b)) for a, b in zip(rng.integers(0, 60, 5), rng.integers(0, 12, 5), strict=True)]
        cursor, count = int(rng.integers(0, 50)), int(rng.integers(1, 20))
        positions, after = take(cursor, count, ranges)
        expected, expected_after = slow_take(cursor, count, ranges)
        assert cursor_after(cursor, count, ranges) == expected_after
        assert positions.tolist() == expected and after == expected_after, (cursor, count, ranges)


def test_cutting_a_run_into_steps_does_not_change_which_samples_are_read():
    ranges = [(3, 9), (9, 12), (20, 21)]
    whole, end = take(0, 24, ranges)
    parts, cursor = [], 0
    for count in (1, 5, 2, 10, 6):
        positions, cursor = take(cursor, count, ranges)
        parts += positions.tolist()
    assert parts == whole.tolist() and cursor == end


def test_merged_ranges_cover_the_same_positions():
    assert merge_ranges([(5, 7), (1, 3), (3, 4), (6, 9), (2, 2)]) == [(1, 4), (5, 9)]

"""Which ranks are reported as slow; noise alone reports none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatrain.resilience.stragglers import WINDOW, Stragglers, _median_of_others


def steps(count, ranks, seed=0, common=0.3):
    """Return own times of equal ranks: normal noise of 5 %; every tenth step takes a rank up to three times as long."""
    rng = np.random.default_rng(seed)
    noise = 1 + 0.05 * rng.standard_normal((count, ranks))
    rare = np.where(rng.random((count, ranks)) < 0.1, 1 + 2 * rng.random((count, ranks)), 1.0)
    together = 1 + common * rng.random((count, 1))  # noise common to all ranks, such as a longer batch
    return 0.1 * noise * rare * together


def recorded():
    """Return own times in ms of 1,000 steps of two ranks (model=tiny, ZeRO-3) on two cores that were also busy."""
    return np.loadtxt(Path(__file__).with_name("own_times.txt"))


def verdicts(stragglers, table):
    return [(step, found) for step, row in enumerate(table) for found in stragglers.judge(row)]


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_slowed_by_30_percent_is_named_once_within_50_steps_and_so_is_its_recovery(ranks, culprit):
    table = steps(400, ranks)
    table[200:300, culprit] *= 1.3
    (named_at, named), (over_at, over) = verdicts(Stragglers([0] * ranks, 1.2), table)
    assert 200 <= named_at < 250 and 300 <= over_at < 350
    assert (named.rank, named.is_slow, over.rank, over.is_slow) == (culprit, True, culprit, False)
    assert 1.2 < named.ratio < 1.4 and named.own_s / named.others_s == pytest.approx(1.3, rel=0.1)


def test_a_thousand_clean_steps_of_a_real_job_on_a_busy_machine_name_no_rank():
    assert len(recorded()) == 999
    assert verdicts(Stragglers([0, 0], 1.2), recorded()) == []


@pytest.mark.parametrize("culprit", [0, 1])
def test_wherever_a_rank_of_a_real_job_becomes_slower_by_30_percent_it_is_named_within_50_steps(culprit):
    for start in range(50, 940, 25):
        table = recorded()[: start + 50]
        table[start:, culprit] *= 1.3
        (named_at, named), *later = verdicts(Stragglers([0, 0], 1.2), table)
        assert named_at >= start and named.is_slow, start
        assert {found.rank for found in (named, *(found for _, found in later))} == {culprit}, start


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_ten_thousand_clean_steps_name_no_rank(ranks):
    assert verdicts(Stragglers([0] * ranks, 1.2), steps(10_000, ranks, seed=ranks)) == []


def test_a_rank_that_is_slow_in_only_half_of_its_steps_is_noise():
    """Other programs on a machine make some steps of a rank much slower and leave the rest as they were."""
    table = steps(2000, 2, common=0.0)
    table[np.arange(2000) % 20 < 10, 0] *= 1.7
    assert verdicts(Stragglers([0, 0], 1.2), table) == []


def test_a_rank_that_is_slower_by_less_than_the_threshold_is_not_named():
    table = 1 + 0.02 * np.random.default_rng(2).standard_normal((1000, 2))
    assert verdicts(Stragglers([0, 0], 1.2), table * [1.17, 1]) == []


def test_stages_are_not_compared_with_one_another():
    """A larger stage is not slow; a slow rank within a stage is found; a rank alone in its stage is never judged."""
    table = steps(200, 5) * [1, 1, 2, 2, 9]
    stages = [0, 0, 1, 1, 2]
    assert verdicts(Stragglers(stages, 1.2), table) == []
    table[60:, 3] *= 1.3
    table[60:, 4] *= 5
    assert {found.rank for _, found in verdicts(Stragglers(stages, 1.2), table)} == {3}


def test_no_rank_is_named_before_a_window_is_full():
    table = steps(WINDOW - 1, 2) * [1, 5]
    assert verdicts(Stragglers([0, 0], 1.2), table) == []
    assert verdicts(Stragglers([0], 1.2), steps(100, 1)) == []


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_a_rank_is_compared_with_the_median_of_the_others(count):
    for seed in range(20):
        values = np.random.default_rng(seed).integers(0, 6, count).astype(float)
        expected = [np.median(np.delete(values, index)) for index in range(count)]
        assert _median_of_others(values).tolist() == expected

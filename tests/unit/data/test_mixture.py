"""A mixture's samples: exact shares at every prefix, and a pure function of the plan and the sample's number."""

import random
from fractions import Fraction

import numpy as np
import pytest

from megatrain.data.mixture import (
    LONGEST_PERIOD,
    MixtureOrder,
    MixturePlan,
    Phase,
    PlannedSource,
    first_windows,
    period,
    seen_shares,
    whole_weights,
)
from megatrain.data.order import SampleOrder

SOURCES = {
    "code": PlannedSource("c" * 32, 11),
    "web": PlannedSource("a" * 32, 1000),
    "zh": PlannedSource("b" * 32, 50),
}
PLAN = MixturePlan(
    SOURCES,
    [
        Phase(0, {"code": 2, "web": 7, "zh": 1}),
        Phase(123, {"web": 1, "zh": 2}),
        Phase(200, {"code": 333, "web": 333, "zh": 1}),
    ],
)


def random_weights(seed):
    draw = random.Random(seed)
    most = draw.choice([2, 9, 60, 300])
    return tuple(draw.randint(1, most) for _ in range(draw.randint(1, 24)))


def plan_of(weights):
    """A plan of one phase with these weights."""
    names = [f"{i:02}" for i in range(len(weights))]
    return MixturePlan(
        {name: PlannedSource("f", 10) for name in names}, [Phase(0, dict(zip(names, weights, strict=True)))]
    )


def test_every_source_is_within_one_sample_of_its_share_at_every_prefix():
    """Tijdeman (1980): a count is at most 1 - 1/(2k - 2) from w * n. Exact, in whole numbers, for 300 mixtures."""
    for seed in range(300):
        weights = random_weights(seed)
        k, total = len(weights), sum(weights)
        sources, own = plan_of(weights).locate(np.arange(2 * total + 7))
        counts = np.cumsum(sources[:, None] == np.arange(k), axis=0)
        assert np.array_equal(own + 1, counts[np.arange(len(sources)), sources])
        n = np.arange(1, len(sources) + 1)[:, None]
        apart = np.abs(np.array(weights) * n - total * counts)  # times total
        assert (apart * max(1, 2 * k - 2) <= total * max(0, 2 * k - 3)).all(), weights


def test_the_bound_holds_in_fractions():
    for seed in range(40):
        weights = random_weights(seed)[:6]
        k, total = len(weights), sum(weights)
        shares = [Fraction(weight, total) for weight in weights]
        bound = 1 - Fraction(1, 2 * k - 2) if k > 1 else Fraction(0)
        counts = [0] * k
        for n, source in enumerate(plan_of(weights).locate(np.arange(min(300, total + 1)))[0].tolist(), start=1):
            counts[source] += 1
            assert max(abs(share * n - count) for share, count in zip(shares, counts, strict=True)) <= bound


def test_a_hundred_sources_of_five_decimals_stay_within_one_sample():
    draw = random.Random(5)
    weights = whole_weights({f"{i:03}": Fraction(str(draw.random())) for i in range(100)})
    assert sum(weights.values()) == LONGEST_PERIOD
    table, _ = period(tuple(weights.values()))
    counts = np.zeros(100, np.int64)
    by_number = np.array(list(weights.values()), np.int64)
    for n, source in enumerate(table, start=1):
        counts[source] += 1
        if n % 97 == 0 or n < 500:
            assert np.abs(by_number * n - LONGEST_PERIOD * counts).max() < LONGEST_PERIOD


def test_the_order_of_samples_is_recorded():
    """A change of this assignment is another data order: runs that resume would read other samples."""
    sources, own = PLAN.locate(np.arange(12))
    assert sources.tolist() == [1, 1, 0, 1, 1, 2, 1, 0, 1, 1, 1, 1]
    assert own.tolist() == [0, 1, 0, 2, 3, 0, 4, 1, 5, 6, 7, 8]


def test_a_sample_looked_up_alone_is_the_sample_in_sequence():
    """Purity, over the ends of periods, phases and epochs."""
    in_sequence = MixtureOrder(PLAN, "train", 8, 3).windows(np.arange(3000))
    alone = MixtureOrder(PLAN, "train", 8, 3)
    ks = np.random.default_rng(0).permutation(3000)
    assert np.array_equal(alone.windows(ks), in_sequence[ks])
    assert [int(alone.windows(np.array([k]))[0]) for k in (0, 122, 123, 199, 200, 2999)] == [
        in_sequence[k] for k in (0, 122, 123, 199, 200, 2999)
    ]


def test_each_source_is_read_in_its_own_order_through_all_phases():
    windows = MixtureOrder(PLAN, "train", 8, 3).windows(np.arange(3000))
    sources, _ = PLAN.locate(np.arange(3000))
    for at, (source, first) in enumerate(zip(SOURCES.values(), first_windows(PLAN)[:-1], strict=True)):
        own = windows[sources == at] - first
        expected = SampleOrder(source.fingerprint, "train", 8, source.samples, 3).windows(np.arange(len(own)))
        assert np.array_equal(own, expected)


def test_counts_are_those_of_the_samples():
    sources, _ = PLAN.locate(np.arange(1000))
    for n in (0, 1, 10, 122, 123, 124, 199, 200, 201, 866, 867, 868, 1000):
        expected = np.bincount(sources[:n], minlength=3).tolist()
        assert list(PLAN.counts(n).values()) == expected


def test_seen_leaves_out_skipped_samples():
    kept = [k for k in range(500) if not (40 <= k < 190 or 300 <= k < 700)]
    sources, _ = PLAN.locate(np.array(kept))
    assert list(PLAN.seen(500, [(300, 700), (40, 100), (90, 190)]).values()) == np.bincount(sources).tolist()


def test_a_later_phase_does_not_change_earlier_samples():
    fewer = MixturePlan(SOURCES, PLAN.phases[:2])
    assert np.array_equal(np.stack(PLAN.locate(np.arange(200))), np.stack(fewer.locate(np.arange(200))))
    assert not np.array_equal(PLAN.locate(np.arange(200, 400))[0], fewer.locate(np.arange(200, 400))[0])


def test_far_samples_cost_what_near_ones_do():
    k = np.array([10**15, 10**15 + 1])
    sources, own = PLAN.locate(k)
    assert own.max() < 10**15 and len(sources) == 2


def test_weights_that_fit_are_exact_and_others_are_rounded():
    assert whole_weights({"a": Fraction("0.7"), "b": Fraction("0.2"), "c": Fraction("0.1")}) == {"a": 7, "b": 2, "c": 1}
    assert whole_weights({"a": Fraction(1), "b": Fraction(2)}) == {"a": 1, "b": 2}
    assert whole_weights(dict.fromkeys("abc", Fraction("33.3"))) == dict.fromkeys("abc", 1)
    rounded = whole_weights({"a": Fraction(1, 3), "b": Fraction(2, 3) - Fraction(1, 10**9), "c": Fraction(1, 30000)})
    assert sum(rounded.values()) == LONGEST_PERIOD
    assert abs(Fraction(rounded["a"], LONGEST_PERIOD) - Fraction(1, 3)) < Fraction(2, LONGEST_PERIOD)


def test_a_share_that_would_be_rounded_to_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^b$"):
        whole_weights({"a": Fraction(1), "b": Fraction(1, 10**7)})


def test_the_fingerprint_tells_mixtures_apart():
    others = [
        MixturePlan({**SOURCES, "zh": PlannedSource("d" * 32, 50)}, PLAN.phases),
        MixturePlan(SOURCES, PLAN.phases[:2]),
        MixturePlan(SOURCES, [PLAN.phases[0], Phase(124, PLAN.phases[1].weights), PLAN.phases[2]]),
        MixturePlan(SOURCES, [Phase(0, {"code": 3, "web": 7, "zh": 1}), *PLAN.phases[1:]]),
    ]
    assert len({plan.fingerprint for plan in [PLAN, *others]}) == 5


def test_records_have_shares_epochs_and_the_weight_in_force():
    shares = seen_shares(PLAN, 150)
    assert shares["code"] == {"samples": 25, "share": round(25 / 150, 6), "weight": 0.0, "epochs": round(25 / 11, 4)}
    assert sum(row["samples"] for row in shares.values()) == 150
    assert shares["zh"]["weight"] == round(2 / 3, 6)

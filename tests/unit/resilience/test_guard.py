"""What the loss guard counts as a spike, and what it does not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatrain.config import ResilienceConfig
from megatrain.resilience.guard import ENOUGH, LossGuard, report


@pytest.fixture
def guard():
    """Return a guard with the default settings."""
    return LossGuard.from_config(ResilienceConfig())


def alarms(guard, losses):
    """Return the spikes that a run with these losses would meet if it continued after each."""
    before, found = [], []
    for step, loss in enumerate(losses, start=1):
        if spike := guard.judge(before, step, loss):
            found.append(spike)
        before = guard.remember(before, loss)
    assert len(before) <= guard.window
    return found


NOISE = np.random.default_rng(7)
STEPS = np.arange(10_000)
CLEAN = {
    "stationary noise": 3.0 + 0.05 * NOISE.standard_normal(10_000),
    "heavy noise": 3.0 + 0.4 * NOISE.standard_normal(10_000),
    "heavy tails": 3.0 + 0.03 * NOISE.laplace(size=10_000),
    "hardly any noise": 3.0 + 1e-6 * NOISE.standard_normal(10_000),
    "no noise at all": np.full(10_000, 2.5),
    "zero": np.zeros(10_000),
    "learned by heart": np.abs(1e-3 + 5e-3 * NOISE.standard_normal(10_000)),
    "falling": 2.0 + 8.5 * np.exp(-STEPS / 300) + 0.03 * NOISE.standard_normal(10_000),
    "falling by a cliff": np.where(STEPS < 5000, 6.0, 2.0) + 0.03 * NOISE.standard_normal(10_000),
    "rising slowly": 2.0 + STEPS / 5000 + 0.03 * NOISE.standard_normal(10_000),
}


@pytest.mark.parametrize("name", CLEAN)
def test_clean_runs_raise_no_alarm(guard, name):
    """Ten thousand steps of losses as in healthy runs."""
    assert alarms(guard, CLEAN[name].tolist()) == []


@pytest.mark.parametrize("level", [0.01, 1.0, 3.0, 11.0])
def test_a_spike_is_found_at_any_level(guard, level):
    """Also after losses without any noise, whose deviation is zero; and the reported numbers are right."""
    (spike,) = alarms(guard, [level] * 50 + [level + 2.0] + [level] * 50)
    assert (spike.step, spike.loss, spike.median) == (51, level + 2.0, level)
    assert spike.zscore == pytest.approx(2.0 / (0.01 * max(1.0, level)))


def test_the_score_is_of_robust_standard_deviations(guard):
    """Normal noise has a deviation of about one, and outliers in the window do not change that."""
    losses = (3.0 + 0.1 * np.random.default_rng(3).standard_normal(128)).tolist()
    losses[::10] = [50.0] * len(losses[::10])
    assert guard.judge(losses, 129, 3.0 + 0.1 * 11) is None
    assert guard.judge(losses, 129, 3.0 + 0.1 * 20).zscore == pytest.approx(20, rel=0.3)


def test_only_upward_jumps_count(guard):
    assert alarms(guard, [5.0] * 60 + [0.5] * 60) == []


def test_the_guard_adapts_to_a_new_level(guard):
    """If a run continues after a lasting spike, the alarms end once most of the window has the new losses."""
    found = alarms(guard, [3.0] * 200 + [5.0] * 200)
    assert [spike.step for spike in found] == list(range(201, 201 + guard.window // 2))


def test_nothing_is_a_spike_before_there_are_enough_losses(guard):
    """The guard needs 32 losses, or a full window if that is shorter."""
    assert guard.judge([3.0] * (ENOUGH - 1), 32, 99.0) is None
    assert guard.judge([3.0] * ENOUGH, 33, 99.0) is not None
    assert LossGuard(12.0, 8).judge([3.0] * 7, 8, 99.0) is None
    assert LossGuard(12.0, 8).judge([3.0] * 8, 9, 99.0) is not None


def test_the_window_holds_only_the_last_losses():
    """Earlier losses change no decision, so a resumed run with the window's losses decides like the undisturbed one."""
    guard = LossGuard(12.0, 16)
    before = [9.0] * 500
    for loss in [2.0] * 16:
        before = guard.remember(before, loss)
    assert before == [2.0] * 16
    assert guard.judge([9.0] * 500 + before, 517, 4.0) == guard.judge(before, 517, 4.0) is not None


def test_a_threshold_of_zero_switches_the_guard_off():
    assert alarms(LossGuard.from_config(ResilienceConfig(spike_zscore=0)), [3.0] * 60 + [1e6]) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_non_finite_losses_are_left_to_the_veto(guard, loss):
    """A non-finite loss is neither a spike nor added to the window."""
    assert guard.judge([3.0] * 60, 61, loss) is None and guard.remember([3.0], loss) == [3.0]


def test_the_report_tells_what_was_seen_and_what_was_tried(guard):
    (spike,) = alarms(guard, [3.0] * 40 + [6.0])
    told = report(spike, [{"step": 38, "loss": 5.0, "zscore": 66.0, "median": 3.0, "skip_range": [240, 304]}])
    assert (
        told
        == "step 38 (loss 5.0000, z 66.0, samples 240 to 303 skipped); step 41 (loss 6.0000, z 100.0, median 3.0000)"
    )

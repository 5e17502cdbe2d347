"""Learning rate and batch size are pure functions of the step."""

from __future__ import annotations

import math

import pytest
import torch

from megatrain.config import OptimConfig, TrainLoopConfig
from megatrain.optim.schedule import batch_size, batch_sizes, learning_rate


def rates(total=100, **options):
    config = OptimConfig(**{"lr": 1.0, "min_lr_ratio": 0.1, "warmup_steps": 10, **options})
    return [learning_rate(config, step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warmup_rises_to_the_peak(schedule):
    """Step s of a warm-up of w steps has s/w of the peak; without warm-up the first step is no longer 0."""
    assert rates(schedule=schedule)[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates(schedule=schedule, warmup_steps=0)[0] > 0.9


def test_cosine_follows_torchs_own():
    """After the warm-up the cosine is torch's CosineAnnealingLR."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.1)
    ours = rates(schedule="cosine")
    for step in range(11, 101):
        optimizer.step()
        oracle.step()
        assert ours[step - 1] == pytest.approx(oracle.get_last_lr()[0])


def test_linear_and_wsd_end_at_the_floor():
    """Linear falls from the warm-up's end, wsd over its last share; both end at min_lr_ratio."""
    linear = rates(schedule="linear")
    assert linear[54] == pytest.approx(0.1 + 0.9 * 0.5) and linear[-1] == pytest.approx(0.1)
    wsd = rates(schedule="wsd", decay_fraction=0.2)
    assert wsd[9:80] == [1.0] * 71
    assert wsd[89] == pytest.approx(0.55) and wsd[-1] == pytest.approx(0.1)
    assert all(rate == 1.0 for rate in rates(schedule="constant")[9:])


def test_a_longer_run_keeps_its_past():
    """Under constant and wsd a run that is made longer had the same rates before the decay."""
    short, long = rates(50, schedule="wsd"), rates(100, schedule="wsd")
    assert short[:40] == long[:40]


def test_batch_ramp_rises_in_equal_intervals():
    """From start to the full size by the increment, never beyond, and full from the step after the ramp on."""
    config = TrainLoopConfig(global_batch_size=16, batch_ramp_start=4, batch_ramp_increment=4, batch_ramp_steps=9)
    sizes = [batch_size(config, step) for step in range(1, 13)]
    assert sizes == [4, 4, 4, 8, 8, 12, 12, 12, 16, 16, 16, 16] or sizes == sorted(sizes)
    assert sizes[0] == 4 and sizes[9:] == [16, 16, 16] and batch_sizes(config) == [4, 8, 12, 16]
    counts = [sizes[:9].count(size) for size in (4, 8, 12)]
    assert max(counts) - min(counts) <= 1
    assert all(math.isclose(size % 4, 0) for size in sizes)


def test_without_a_ramp_the_size_is_constant():
    """No start, no ramp."""
    assert {batch_size(TrainLoopConfig(global_batch_size=8), step) for step in range(1, 50)} == {8}
    assert batch_sizes(TrainLoopConfig(global_batch_size=8)) == [8]

"""One rule moves the fp16 loss scale in every engine."""

from __future__ import annotations

import random

import pytest
import torch

from megatrain.config import PrecisionConfig
from megatrain.errors import DivergedError
from megatrain.optim.loss_scale import LossScaler


def scaler(**options):
    fields = {"name": "fp16", "initial_loss_scale": 1024.0, "loss_scale_window": 4, "loss_scale_hysteresis": 2}
    return LossScaler.from_config(PrecisionConfig(**{**fields, **options}))


def test_without_hysteresis_the_rule_is_torchs_own():
    """Over a long random history the scale is the one that torch's GradScaler kernel would have."""
    ours = scaler(loss_scale_hysteresis=1, min_loss_scale=2.0**-60)
    scale, good = torch.tensor([1024.0]), torch.tensor([0], dtype=torch.int32)
    draw = random.Random(0)
    for _ in range(400):
        overflow = draw.random() < 0.12
        torch._amp_update_scale_(scale, good, torch.tensor([float(overflow)]), 2.0, 0.5, 4)
        ours.update(overflow)
        assert ours.scale == float(scale)


def test_the_scale_doubles_after_a_window_and_halves_after_hysteresis():
    """Four good steps double it; the first overflow is tolerated, the second halves it; good steps count anew."""
    one = scaler()
    for overflow, expected in [(False, 1024)] * 3 + [(False, 2048), (True, 2048), (True, 1024), (True, 512)]:
        one.update(overflow)
        assert one.scale == expected
    for expected in (512, 512, 512, 1024):
        one.update(False)
        assert one.scale == expected
    assert one.hysteresis == 2


def test_an_overflow_at_the_smallest_scale_ends_the_run():
    """Nothing smaller is allowed: the user is told what to change."""
    one = scaler(initial_loss_scale=1.0, loss_scale_hysteresis=1)
    with pytest.raises(DivergedError, match=r"precision\.min_loss_scale"):
        one.update(True)


def test_the_state_continues_where_it_stood():
    """A scaler that loads another's state moves as that one does."""
    one, other = scaler(), scaler()
    for overflow in (False, True, False, False):
        one.update(overflow)
    other.load(one.state())
    for overflow in (False, True, True, False, False, False, False):
        one.update(overflow)
        other.update(overflow)
        assert one == other


def test_other_precisions_have_no_scale():
    """In fp32 and bf16 the scale is 1, whatever happens, and a checkpoint's state does not change that."""
    one = scaler(name="bf16")
    one.load({"scale": 8.0, "good_steps": 1, "hysteresis": 1})
    one.update(True)
    assert one.scale == 1.0

"""AdamW with moments in bf16: torch's with fp32 ones is what it is compared with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from megatrain.config import OptimConfig
from megatrain.optim.adamw import LowMomentsAdamW, adamw, parameter_groups
from megatrain.optim.optimizers import create_slots
from megatrain.optim.slots import slots_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {"a.weight": (33, 20), "a.bias": (33,), "b.weight": (1, 7)}


def made(moments, seed=3, lr=1e-2):
    generator = torch.Generator().manual_seed(1)
    parameters = {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for name, shape in SHAPES.items()
    }
    config = OptimConfig(lr=lr, moments=moments)
    groups = parameter_groups(((name, p, p.dim()) for name, p in parameters.items()), config)
    places = {p: (name, 0) for name, p in parameters.items()}
    optimizer = adamw(groups, config, seed, places)
    slots = (
        (p, [(slot, slot.shape) for slot in slots_of(config, name, tuple(p.shape))]) for name, p in parameters.items()
    )
    create_slots(optimizer, slots, step=0)
    return list(parameters.values()), optimizer


def gradients(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator).to(DEVICE) for p in parameters]


def steps(parameters, optimizer, first, last, scale=1.0, bad=()):
    for step in range(first, last + 1):
        for p, g in zip(parameters, gradients(parameters, step), strict=True):
            p.grad = g * scale
        optimizer.grad_scale = torch.full((), scale, device=DEVICE)
        optimizer.found_inf = torch.full((), float(step in bad), device=DEVICE)
        optimizer.train_step = step
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def test_many_steps_stay_near_those_with_fp32_moments():
    low, high = steps(*made("bf16"), 1, 50), steps(*made("fp32"), 1, 50)
    start = [p.detach() for p in made("fp32")[0]]
    for ours, theirs, begin in zip(low, high, start, strict=True):
        assert (ours - theirs).norm() < 0.02 * (theirs - begin).norm()
    assert isinstance(made("bf16")[1], LowMomentsAdamW) and type(made("fp32")[1]) is torch.optim.AdamW


def test_moments_are_bf16_and_parameters_are_not():
    parameters, optimizer = made("bf16")
    steps(parameters, optimizer, 1, 2)
    assert all(
        optimizer.state[p][moment].dtype == torch.bfloat16 for p in parameters for moment in ("exp_avg", "exp_avg_sq")
    )
    assert all(p.dtype == torch.float32 and optimizer.state[p]["exp_avg_sq"].any() for p in parameters)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_going_on_from_a_copy_gives_the_same_bits_and_a_scale_of_gradients_cancels(scale):
    whole = steps(*made("bf16"), 1, 6)
    parameters, optimizer = made("bf16")
    steps(parameters, optimizer, 1, 3, scale)
    states = [copy.deepcopy(dict(optimizer.state[p])) for p in parameters]
    values = [p.detach().clone() for p in parameters]
    parameters, optimizer = made("bf16")
    with torch.no_grad():
        for p, value, kept in zip(parameters, values, states, strict=True):
            p.copy_(value)
            for name, tensor in kept.items():
                optimizer.state[p][name].copy_(tensor)
    again = steps(parameters, optimizer, 4, 6, scale)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_a_vetoed_step_changes_nothing_and_does_not_count():
    """Then the step after it corrects its moments as the one after the last that did."""
    parameters, optimizer = made("bf16")
    before = steps(parameters, optimizer, 1, 2)
    kept = [copy.deepcopy(dict(optimizer.state[p])) for p in parameters]
    after = steps(parameters, optimizer, 3, 3, bad={3})
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for p, old in zip(parameters, kept, strict=True):
        assert all(torch.equal(old[name], optimizer.state[p][name]) for name in old)
    steps(parameters, optimizer, 4, 4)
    assert {int(optimizer.state[p]["step"]) for p in parameters} == {3}


def test_rounding_is_another_with_another_seed():
    one, other = steps(*made("bf16", seed=1), 1, 5), steps(*made("bf16", seed=2), 1, 5)
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_rounding_is_another_in_another_step():
    """Else every step would err to the same side."""

    def moments(train_step):
        parameters, optimizer = made("bf16")
        for p, g in zip(parameters, gradients(parameters, 1), strict=True):
            p.grad = g
        optimizer.train_step = train_step
        optimizer.step()
        return torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in parameters])

    assert torch.equal(moments(4), moments(4)) and not torch.equal(moments(4), moments(5))

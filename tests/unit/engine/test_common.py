"""What both engines share: dropout seeds, loss scaling, means of scalars, and the counters that a checkpoint keeps."""

from __future__ import annotations

import pytest
import torch

from megatrain.config import PrecisionConfig
from megatrain.engine.common import dropout_seed, engine_counters, loss_factor, mean_scalars, on_device, scaled_loss
from megatrain.optim.loss_scale import LossScaler


def test_a_dropout_seed_depends_on_every_argument():
    base = (1, 2, 3, 4, 5)
    changed = [tuple(value + (index == at) for index, value in enumerate(base)) for at in range(5)]
    assert len({dropout_seed(*arguments) for arguments in (base, *changed)}) == 6
    assert dropout_seed(1, 23, 4, 5) != dropout_seed(12, 3, 4, 5)  # the numbers are kept apart


def test_dropout_seeds_stay_the_same_across_versions():
    """A resumed run must draw the masks that the uninterrupted one would have drawn."""
    assert dropout_seed(1234, 1, 0, 0) == 2817358672663180818 == dropout_seed(1234, 1, 0, 0, tensor_rank=0)
    assert dropout_seed(1234, 1, 0, 0, tensor_rank=3) == 2216489952626201160
    assert 0 <= dropout_seed(1234, 1, 0, 0) < 2**63  # torch's generators take a signed number


@pytest.mark.parametrize(("scale", "tokens", "expected"), [(1.0, 4, 0.25), (1024.0, 8, 128.0), (2.0, 0, 2.0)])
def test_the_loss_factor_divides_by_the_tokens_of_the_step(scale, tokens, expected):
    """A step without tokens divides by 1, not by 0."""
    factor = loss_factor(scale, torch.tensor(tokens))
    assert factor.dtype == torch.float32 and factor.shape == () and factor.item() == expected


def test_a_finite_loss_is_multiplied_by_the_factor():
    weight = torch.tensor(3.0, requires_grad=True)
    scaled = scaled_loss(weight * 2, torch.tensor(0.5))
    scaled.backward()
    assert scaled.item() == 3.0 and weight.grad.item() == 1.0


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_makes_every_gradient_nan(bad):
    """The gradient of a sum does not depend on its value: without this an overflow would leave it finite."""
    weight = torch.ones(3, requires_grad=True)
    scaled_loss(weight.sum() + bad, torch.tensor(0.5)).backward()
    assert weight.grad.isnan().all()


@pytest.mark.parametrize(("count", "expected"), [(4, [0.5, 2.0]), (0, [2.0, 8.0])])
def test_scalars_are_recorded_as_means(count, expected):
    means = mean_scalars(("a", "b"), torch.tensor([2.0, 8.0], dtype=torch.float64), torch.tensor(count))
    assert list(means) == ["a", "b"] and [mean.item() for mean in means.values()] == expected
    assert all(mean.dtype == torch.float32 for mean in means.values())


def test_each_scalar_needs_a_name():
    with pytest.raises(ValueError, match="shorter"):
        mean_scalars(("a", "b"), torch.zeros(1), torch.tensor(1))


def test_numbers_are_int64_scalars():
    number = on_device(2**40, torch.device("cpu"))
    assert number.dtype == torch.int64 and number.shape == () and number.item() == 2**40


def group(name, lr, weight_decay):
    return {"name": name, "params": [], "lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}


def test_counters_group_parameters_by_whether_they_decay():
    """Membership follows the global shapes; groups that are not by decay are left out."""
    shapes = {"a.weight": (4, 2), "a.bias": (4,), "b.weight": (2, 2)}
    groups = [group("decay", 0.1, 0.01), group("no_decay", 0.1, 0.0), group("other", 1.0, 1.0), {"params": []}]
    counters = engine_counters("adamw", groups, shapes, 7, LossScaler.from_config(PrecisionConfig(name="fp32")))
    optimizer = counters.optimizer
    assert (optimizer.name, optimizer.step, counters.loss_scale) == ("adamw", 7, None)
    assert list(optimizer.groups) == ["decay", "no_decay"]
    assert optimizer.groups["decay"].parameters == ["a.weight", "b.weight"]
    assert optimizer.groups["no_decay"].parameters == ["a.bias"]
    assert optimizer.groups["decay"].settings == {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}


def test_counters_hold_the_loss_scale_of_fp16():
    scaler = LossScaler.from_config(PrecisionConfig(name="fp16", initial_loss_scale=512.0))
    assert engine_counters("adamw", [], {}, 0, scaler).loss_scale.scale == 512.0

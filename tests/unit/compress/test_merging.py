"""The formulas of merging equal those of their papers, computed in float64, and thresholds keep an exact number."""

import math

import numpy as np
import pytest
import torch

from megatrain.compress.magnitudes import keep_threshold
from megatrain.compress.merge import average, ema_weights, slerp, ties


def tensors(count, shape=(7, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def numbers(found):
    return [tensor.double().numpy() for tensor in found]


def test_an_average_is_the_weighted_mean():
    found = tensors(3)
    a, b, c = numbers(found)
    wanted = (0.5 * a + 2 * b + 1.5 * c) / 4
    assert np.array_equal(average(found, [0.5, 2, 1.5]).numpy(), wanted.astype(np.float32))
    same = average([found[0]] * 3, [1 / 3] * 3)
    assert torch.equal(same, found[0]), "a model merged with itself stays as it is"


def test_an_exponential_moving_average_moves_by_a_share_at_each_model():
    found = tensors(5)
    moving = found[0].double()
    for tensor in found[1:]:
        moving = 0.9 * moving + 0.1 * tensor.double()
    weights = ema_weights(5, 0.9)
    assert sum(weights) == pytest.approx(1, abs=1e-15)
    assert torch.allclose(average(found, weights).double(), moving, atol=1e-7)


@pytest.mark.parametrize("at", [0.0, 0.3, 0.5, 1.0])
def test_slerp_goes_along_the_arc(at):
    """The result lies at the share `at` of the angle, by the formula of Shoemake; its ends are the two models."""
    first, second = tensors(2, seed=3)
    a, b = (x.flatten() for x in numbers([first, second]))
    angle = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    wanted = (math.sin((1 - at) * angle) * a + math.sin(at * angle) * b) / math.sin(angle)
    found = slerp(first, second, at)
    assert np.allclose(found.double().numpy().flatten(), wanted, atol=1e-7)
    if at in (0.0, 1.0):
        assert torch.allclose(found, [first, second][int(at)], atol=1e-7)


def test_slerp_keeps_the_length_of_two_tensors_of_one_length():
    first, second = (tensor / tensor.norm() for tensor in tensors(2, seed=4))
    assert float(slerp(first, second, 0.5).norm()) == pytest.approx(1, abs=1e-6)
    assert float(((first + second) / 2).norm()) < 0.9, "which the mean does not"


def test_slerp_of_parallel_and_empty_directions_is_a_straight_line():
    first = tensors(1)[0]
    assert torch.allclose(slerp(first, 3 * first, 0.5), 2 * first)
    assert torch.equal(slerp(torch.zeros(4), torch.zeros(4), 0.5), torch.zeros(4))
    assert torch.allclose(slerp(first, -first, 0.25), 0.5 * first), "opposite ones have no arc of their own"


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.2, 0.5, 1.3]])
def test_ties_trims_elects_and_averages_as_its_paper(weights):
    base, *found = tensors(4, shape=(9, 11), seed=5)
    origin, *models = numbers([base, *found])
    changes = [(m - origin).astype(np.float32).astype(np.float64) for m in models]
    keep = round(0.3 * 99)
    trimmed = []
    for c in changes:
        order = np.argsort(-np.abs(c), axis=None)
        kept = np.zeros(99)
        kept[order[:keep]] = c.flatten()[order[:keep]]
        trimmed.append(kept.reshape(9, 11))
    wanted = np.zeros((9, 11))
    for place in np.ndindex(9, 11):
        sign = np.sign(sum(w * t[place] for w, t in zip(weights, trimmed, strict=True)))
        chosen = [(w, t[place]) for w, t in zip(weights, trimmed, strict=True) if np.sign(t[place]) == sign != 0]
        if chosen:
            wanted[place] = sum(w * t for w, t in chosen) / sum(w for w, _ in chosen)
    thresholds = [keep_threshold(lambda c=c: [torch.tensor(c, dtype=torch.float32)], keep) for c in changes]
    result = ties(base, found, weights, thresholds, scale=0.7)
    assert np.allclose(result.double().numpy(), origin + 0.7 * wanted, atol=1e-6)
    assert not np.allclose(result.double().numpy(), origin + 0.7 * sum(changes) / 3, atol=1e-2), "and no plain mean"


def test_what_no_model_changed_stays_the_base():
    base = tensors(1)[0]
    assert torch.equal(ties(base, [base, base], [1, 1], [0.0, 0.0], 1.0), base)


@pytest.mark.parametrize("keep", [1, 2, 40, 500, 999, 1000])
def test_a_threshold_keeps_exactly_the_largest_values_of_all_tensors(keep):
    """As sorting all of them does, whatever their scales."""
    found = [scale * t for scale, t in zip([1e-6, 1, 1e4, 1], tensors(4, shape=(250,), seed=6), strict=True)]
    values = torch.cat(found).abs().sort(descending=True).values
    threshold = keep_threshold(lambda: found, keep)
    assert threshold == float(values[keep - 1])
    assert sum(int((t.abs() >= threshold).sum()) for t in found) == keep


def test_nothing_is_kept_above_an_infinite_threshold():
    assert keep_threshold(lambda: tensors(1), 0) == math.inf

"""Formulas that merge models of equal shape into one, tensor by tensor: averages, SLERP and TIES.

Everything is computed in float64 and stored in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.compress.magnitudes import keep_threshold
from megatrain.interop.source import Source
from megatrain.model.count import num_parameters, parameter_shapes

PARALLEL = 0.9995
"""Cosine of two tensors from which SLERP is a straight line: the sine of their angle is too small to divide by."""


def ema_weights(count: int, decay: float) -> list[float]:
    """Return the weights of `count` checkpoints, oldest first, in their exponential moving average; their sum is 1.

    The average begins as the first checkpoint, and each further one moves it: `decay` x average + (1 - `decay`) x it.
    """
    return [decay ** (count - 1), *((1 - decay) * decay ** (count - 1 - n) for n in range(1, count))]


def average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the mean of tensors by `weights`, which need not sum to 1 (Wortsman et al., 2022, arXiv:2203.05482)."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.double()
    return (total / math.fsum(weights)).float()


def slerp(first: Tensor, second: Tensor, at: float) -> Tensor:
    """Return the point at `at` (0: first, 1: second) of the arc between two tensors as vectors (Shoemake, 1985).

    Tensors without a direction of their own, or with (nearly) the same or the opposite one, lie on a straight line.
    """
    a, b = first.double(), second.double()
    norms = a.norm() * b.norm()
    cosine = float((a * b).sum() / norms) if float(norms) else 1.0
    if abs(cosine) > PARALLEL:
        return ((1 - at) * a + at * b).float()
    angle = math.acos(cosine)
    return ((math.sin((1 - at) * angle) * a + math.sin(at * angle) * b) / math.sin(angle)).float()


def ties(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], thresholds: Sequence[float], scale: float
) -> Tensor:
    """Return `base` plus the merged changes of `tensors` (TIES: Yadav et al., 2023, arXiv:2306.01708).

    Of each change the values below its threshold are dropped. Each element takes the sign that has the larger weighted
    sum, and the weighted mean of the changes of that sign, times `scale`.
    """
    changes = [change(tensor, base) for tensor in tensors]
    kept = [c.double() * (c.abs() >= threshold) for c, threshold in zip(changes, thresholds, strict=True)]
    weighted = [weight * c for weight, c in zip(weights, kept, strict=True)]
    sign = torch.stack(weighted).sum(0).sign()
    total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for weight, c, part in zip(weights, kept, weighted, strict=True):
        agrees = (c.sign() == sign) & (c != 0)
        total += part * agrees
        divisor += weight * agrees
    return (base.double() + scale * total / divisor.where(divisor > 0, 1.0)).float()


def change(tensor: Tensor, base: Tensor) -> Tensor:
    """Return what training changed, rounded to float32: thresholds are found and compared among these values."""
    return (tensor.double() - base.double()).float()


@dataclass(frozen=True)
class Formula:
    """How models are merged: `by` is `average`, `slerp` or `ties`; the rest is what that formula reads.

    `weights` are those of the models. `at` is the place on the arc of SLERP. TIES keeps the share `density` of each
    model's changes to `base`, the largest of the whole model or of each tensor (`within`), and multiplies by `scale`.
    """

    by: str
    weights: Sequence[float]
    at: float = 0.5
    base: Source | None = None
    density: float = 0.2
    within: str = "model"
    scale: float = 1.0


def merged(sources: Sequence[Source], formula: Formula) -> Iterator[Tensor]:
    """Yield the tensors of the merged model in the model's order; of each source, one tensor is in memory."""
    base = formula.base
    overall = [_model_threshold(source, formula) for source in sources] if base and formula.within == "model" else []
    for name in parameter_shapes(sources[0].config):
        tensors = [source.read(name) for source in sources]
        if formula.by == "average":
            yield average(tensors, formula.weights)
        elif formula.by == "slerp":
            yield slerp(tensors[0], tensors[1], formula.at)
        else:
            assert base is not None, "ties has a base"
            origin = base.read(name)
            thresholds = overall or [_tensor_threshold(tensor, origin, formula.density) for tensor in tensors]
            yield ties(origin, tensors, formula.weights, thresholds, formula.scale)


def _model_threshold(source: Source, formula: Formula) -> float:
    base = formula.base
    assert base is not None, "ties has a base"
    keep = round(formula.density * num_parameters(source.config))
    return keep_threshold(lambda: (change(tensor, base.read(name)) for name, tensor in source.tensors()), keep)


def _tensor_threshold(tensor: Tensor, base: Tensor, density: float) -> float:
    found = change(tensor, base)
    return keep_threshold(lambda: [found], round(density * found.numel()))

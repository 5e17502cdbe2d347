"""Set the smallest weights of the linear layers inside blocks to zero: a share of them, or two of every four.

Pruned weights are stored as zeros among the others, so the file does not become smaller: the zeros are for hardware
that skips them (2:4), and for compression of the file.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatrain.compress.magnitudes import keep_threshold
from megatrain.interop.source import Source
from megatrain.model.count import parameter_shapes
from megatrain.model.quantized import is_quantizable

GROUP = 4


def share_threshold(source: Source, share: float) -> float:
    """Return the smallest magnitude that stays when the `share` of the smallest weights of all layers is dropped."""
    shapes = parameter_shapes(source.config)
    names = [name for name, shape in shapes.items() if is_quantizable(name, shape)]
    count = sum(math.prod(shapes[name]) for name in names)
    return keep_threshold(lambda: map(source.read, names), count - round(share * count))


def without_small(weight: Tensor, threshold: float) -> Tensor:
    """Return a weight whose values of a smaller magnitude than the threshold are zero."""
    return weight * (weight.abs() >= threshold)


def tensor_threshold(weight: Tensor, share: float) -> float:
    """Return the threshold that drops the `share` of the smallest values of one tensor."""
    return keep_threshold(lambda: [weight], weight.numel() - round(share * weight.numel()))


def two_of_four(weight: Tensor) -> Tensor:
    """Return a weight `[N, K]` of which each four neighbours in a row keep the two of the largest magnitude.

    K must be a multiple of 4. (Mishra et al., 2021, arXiv:2104.08378.)
    """
    groups = weight.unflatten(1, (-1, GROUP))
    kept = torch.zeros_like(groups).scatter_(-1, groups.abs().topk(GROUP // 2, dim=-1).indices, 1.0)
    pruned: Tensor = (groups * kept).flatten(1)
    return pruned

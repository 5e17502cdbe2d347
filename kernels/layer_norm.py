"""LayerNorm: the plain reference. No module, no parameters: those belong to the model."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension (Ba et al., 2016, arXiv:1607.06450).

    `x` is `[..., D]`, `weight` and `bias` `[D]`; returns `[..., D]` in `x`'s dtype. `var` is the biased variance; mean
    and variance are accumulated in fp32 whatever `x`'s dtype.

    Gradients, with `r = 1/sqrt(var + eps)`, `n = (x - mean) * r`, `g` the gradient of the output and `h = g * weight`:
    `d_bias = sum(g)` and `d_weight = sum(g * n)` over all but the last dimension, and
    `d_x = r * (h - mean(h) - n * mean(h * n))`, the means over the last dimension.
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

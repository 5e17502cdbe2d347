"""RMSNorm: the plain reference. No module, no parameters: those belong to the model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, 2019, arXiv:1910.07467).

    `x` is `[..., D]`, `weight` `[D]`; returns `[..., D]` in `x`'s dtype. For 16-bit `x` the mean and the division are
    taken in fp32 and the result is rounded to `x`'s dtype before the weight multiplies it, as Llama does.

    Gradients, with `r = 1/sqrt(mean(x^2) + eps)`, `n = x * r` and `g` the gradient of the output:
    `d_weight = sum(g * n)` over all but the last dimension, and
    `d_x = r * (g * weight - n * mean(g * weight * n))`, the mean over the last dimension.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        return F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype) * weight
    return F.rms_norm(x, (x.shape[-1],), weight, eps)

"""Rotary position embedding: the plain reference, in the rotate-half convention of Hugging Face checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotation angles, fp32.

    `positions` are integers `[..., T]`; returns two tensors `[..., T, K/2]`. Pair `i` of a head turns by
    `position * theta^(-2i/K)` (Su et al., 2021, arXiv:2104.09864). Constants of the model: no gradient.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    angles = positions.unsqueeze(-1).float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair `(x[i], x[i + K/2])` of a head by its angle.

    `x` is `[B, H, T, K]`; `cos` and `sin` are `[T, K/2]` or `[B, 1, T, K/2]`, fp32. Computed in fp32, returned in `x`'s
    dtype: `y1 = x1 cos - x2 sin`, `y2 = x2 cos + x1 sin`. With pairs half a head apart, not neighbours, Hugging Face
    weights need no permutation.

    Gradient: a rotation's transpose is the rotation back, so `d_x = apply_rope(d_y, cos, -sin)`.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

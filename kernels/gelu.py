"""GELU in GPT-2's tanh approximation: the plain reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def gelu(x: Tensor) -> Tensor:
    """`0.5 x (1 + tanh(u))`, `u = sqrt(2/pi) (x + 0.044715 x^3)` (Hendrycks and Gimpel, 2016, arXiv:1606.08415).

    Elementwise, any shape, dtype kept.

    Gradient, with `t = tanh(u)`: `d_x = g * (0.5 (1 + t) + 0.5 x (1 - t^2) sqrt(2/pi) (1 + 3 * 0.044715 x^2))`.
    """
    return F.gelu(x, approximate="tanh")

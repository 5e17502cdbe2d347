"""SwiGLU: the plain reference of the gate between the feed-forward layer's projections."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer, 2020, arXiv:2002.05202), elementwise; any equal shapes, dtype kept.

    Gradients, with `s = sigmoid(gate)` and `g` the gradient of the output: `d_up = g * gate * s` and
    `d_gate = g * up * s * (1 + gate * (1 - s))`.
    """
    return F.silu(gate) * up

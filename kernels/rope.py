"""Rotary position embedding, in the rotate-half convention of Hugging Face checkpoints.

The angles, the plain references, and the fused rotation of queries and keys in one launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from megatrain.kernels.support import compute_type, jit, launch, next_power_of_2, num_warps, require, rounded, tl

_BLOCK = 4096
"""Pairs that a program rotates at once."""


def rope_frequencies(head_dim: int, theta: float | Tensor, device: torch.device) -> Tensor:
    """Return the rotation of each pair of a head from one position to the next, in radians: fp32 `[K/2]`.

    Pair `i` has `theta^(-2i/K)` (Su et al., 2021, arXiv:2104.09864).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies: Tensor = 1.0 / theta**exponents
    return frequencies


def rope_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of every position's rotation angles, fp32.

    `positions` are integers `[..., T]`; returns two tensors `[..., T, K/2]`. A pair is rotated by its frequency times
    the position. The angles are constants and get no gradient.
    """
    angles = positions.unsqueeze(-1).float() * rope_frequencies(head_dim, theta, positions.device)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair `(x[i], x[i + K/2])` of a head by its angle.

    `x` is `[B, H, T, K]`; `cos` and `sin` are `[T, K/2]` or `[B, 1, T, K/2]`, fp32. Computed in fp32, returned in `x`'s
    dtype: `y1 = x1 cos - x2 sin`, `y2 = x2 cos + x1 sin`. Because pairs are half a head apart instead of adjacent,
    Hugging Face weights need no permutation.

    Gradient: the transpose of a rotation is its inverse, so `d_x = apply_rope(d_y, cos, -sin)`.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Apply `apply_rope` to queries and keys.

    `q` is `[B, H, T, K]`, `k` `[B, Hkv, T, K]`, `cos` and `sin` as for `apply_rope`; gradients as there.
    """
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin)


def fused_rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `rope_qk` in one launch. Takes any strides without a copy; results have the memory layout of the inputs.

    Computed in fp32 (fp64 for fp64 inputs). `cos` and `sin` get no gradient.

    Raises:
        KernelError: Triton cannot take these tensors (`support.unsupported(q, k, cos, sin)`).
    """
    rotated_q, rotated_k = _rope_qk(q, k, cos, sin, False)
    return rotated_q, rotated_k


@jit
def _rotate(
    x: tl.tensor,
    y: tl.tensor,
    c: tl.tensor,
    s: tl.tensor,
    x_head: tl.tensor,
    x_element: tl.tensor,
    y_head: tl.tensor,
    y_element: tl.tensor,
    num_heads: tl.tensor,
    half: tl.tensor,
    COMPUTE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rotate all heads of one token, HEADS at a time; `c` and `s` `[1, BLOCK]` are the cosines and sines."""
    pairs = tl.arange(0, BLOCK)[None, :]
    for first in range(0, num_heads, HEADS):
        heads = first + tl.arange(0, HEADS)[:, None].to(tl.int64)
        inside = (heads < num_heads) & (pairs < half)
        x_first = x + heads * x_head + pairs * x_element
        y_first = y + heads * y_head + pairs * y_element
        a = tl.load(x_first, mask=inside).to(COMPUTE)
        b = tl.load(x_first + half * x_element, mask=inside).to(COMPUTE)
        tl.store(y_first, rounded(a * c - b * s, y.dtype.element_ty), mask=inside)
        tl.store(y_first + half * y_element, rounded(b * c + a * s, y.dtype.element_ty), mask=inside)


@jit
def _rope_qk_kernel(
    q: tl.tensor,
    k: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    q_element: tl.tensor,
    k_batch: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    k_element: tl.tensor,
    q_out_batch: tl.tensor,
    q_out_head: tl.tensor,
    q_out_token: tl.tensor,
    q_out_element: tl.tensor,
    k_out_batch: tl.tensor,
    k_out_head: tl.tensor,
    k_out_token: tl.tensor,
    k_out_element: tl.tensor,
    angle_batch: tl.tensor,
    angle_token: tl.tensor,
    num_q_heads: tl.tensor,
    num_k_heads: tl.tensor,
    half: tl.tensor,
    INVERSE: tl.constexpr,
    COMPUTE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Rotate one token of one sequence; its angles are read once for all heads."""
    t, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pairs = tl.arange(0, BLOCK)[None, :]
    angles = b * angle_batch + t * angle_token + pairs
    c = tl.load(cos + angles, mask=pairs < half).to(COMPUTE)
    s = tl.load(sin + angles, mask=pairs < half).to(COMPUTE)
    if INVERSE:
        s = -s
    _rotate(
        q + b * q_batch + t * q_token,
        q_out + b * q_out_batch + t * q_out_token,
        c,
        s,
        q_head,
        q_element,
        q_out_head,
        q_out_element,
        num_q_heads,
        half,
        COMPUTE,
        Q_HEADS,
        BLOCK,
    )
    _rotate(
        k + b * k_batch + t * k_token,
        k_out + b * k_out_batch + t * k_out_token,
        c,
        s,
        k_head,
        k_element,
        k_out_head,
        k_out_element,
        num_k_heads,
        half,
        COMPUTE,
        K_HEADS,
        BLOCK,
    )


def _angle_strides(cos: Tensor, batch: int, num_tokens: int, half: int) -> tuple[int, int]:
    """Return the angles' strides from one sequence and one token to the next; 0 if all sequences share the angles."""
    allowed = [(num_tokens, half), (1, 1, num_tokens, half), (batch, 1, num_tokens, half)]
    assert tuple(cos.shape) in allowed, (tuple(cos.shape), allowed)
    return (0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0)), cos.stride(-2)


@library.custom_op("megatrain::rope_qk", mutates_args=())
def _rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, backwards if `inverse`."""
    require(q, k, cos, sin)
    batch, num_q_heads, num_tokens, head_dim = q.shape
    num_k_heads, half = k.shape[1], head_dim // 2
    assert q.dtype == k.dtype and tuple(k.shape) == (batch, num_k_heads, num_tokens, head_dim), (q.shape, k.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    block = next_power_of_2(half)
    most = max(1, _BLOCK // block)
    q_heads, k_heads = (min(next_power_of_2(heads), most) for heads in (num_q_heads, num_k_heads))
    launch(
        _rope_qk_kernel,
        (num_tokens, batch),
        *(q, k, q_out, k_out, cos, sin, *q.stride(), *k.stride(), *q_out.stride(), *k_out.stride()),
        *(*_angle_strides(cos, batch, num_tokens, half), num_q_heads, num_k_heads, half),
        INVERSE=inverse,
        COMPUTE=compute_type(q),
        Q_HEADS=q_heads,
        K_HEADS=k_heads,
        BLOCK=block,
        num_warps=num_warps(block * max(q_heads, k_heads)),
    )
    return q_out, k_out


@_rope_qk.register_fake
def _(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx: Any, g_q: Tensor, g_k: Tensor) -> tuple[Tensor | None, ...]:
    return *_rope_qk(g_q, g_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope_qk.register_autograd(_gradient, setup_context=_save)

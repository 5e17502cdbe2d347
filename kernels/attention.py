"""Causal attention, by PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Return `softmax(q k^T / sqrt(K)) v` for each head (Vaswani et al., 2017, arXiv:1706.03762).

    `q` is `[B, H, T, K]`, `k` and `v` `[B, Hkv, S, K]` with `Hkv` a divisor of `H` (grouped-query attention: each
    key-value head serves `H / Hkv` neighbouring query heads); returns `[B, H, T, K]`. `mask` is broadcastable to
    `[B, H, T, S]`: either bool, true where a query may attend to a key, or of q's dtype and added to the scores.
    Without a mask, attention is causal, the last query is at the last key's position, and `T` must be `S` or 1.
    `dropout` is the probability of dropping an attention weight.

    Gradients, with `P` the softmax, `g` the gradient of the output and `dP = g v^T`: `d_v = P^T g`,
    `dS = P * (dP - rowsum(dP * P))`, `d_q = dS k / sqrt(K)`, `d_k = dS^T q / sqrt(K)`.
    """
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    assert mask is not None or num_queries in (1, num_keys), (num_queries, num_keys)
    if mask is not None and q.shape[1] != k.shape[1]:  # few of torch's fused kernels support both
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and num_queries > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def document_mask(document_ids: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return a block-diagonal causal mask: a token attends to itself and to earlier tokens of its own document.

    With a `window`, it attends to no more than that many tokens, itself included.
    `document_ids` are integers `[B, T]`; returns `[B, 1, T, T]` in `dtype`: 0 where the row's query may attend to the
    column's key, else -inf. A bool mask would be converted to this in every layer, and each copy kept.
    """
    same = (document_ids[:, :, None] == document_ids[:, None, :]).tril().unsqueeze(1)
    if window is not None:
        same = same.triu(1 - window)
    return torch.zeros(same.shape, dtype=dtype, device=same.device).masked_fill_(~same, -torch.inf)

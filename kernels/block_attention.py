"""Attention of a block of queries over a block of keys, and its gradients: a part of attention over the whole sequence.

Ring attention (parallel/context.py) merges the parts by their log-sum-exps. Torch's fused kernels compute a block where
they apply. Elsewhere plain products do, a tile of query rows at a time. Neither holds a block's scores at once, so
memory grows with the block's length, not with its square. Results are fp32, or float64 for float64 inputs. Torch's
kernel on a CPU computes in that format too; on a GPU it multiplies bf16 or fp16 and returns them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from megatrain.kernels import SCORE_TILE_BYTES

_ATEN = torch.ops.aten


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, fused: bool = True
) -> tuple[Tensor, Tensor]:
    """Return `softmax(scores) v` `[B, H, T, K]` and the log-sum-exp of the scores' rows `[B, H, T]`.

    The scores are `q k^T / sqrt(K)`. `q` is `[B, H, T, K]`, `k` and `v` `[B, Hkv, S, K]`. `mask`, of T rows and S
    columns and broadcastable to `[B, H, T, S]`, is added to the scores; -inf excludes a key. Without a mask and with
    `causal`, query i sees keys 0 to i, and `T` must be `S`. A row whose keys are all excluded gives zeros and -inf.
    `fused=False` computes in tiles.
    """
    causal = causal and mask is None
    q, k, v = _dense(q), _dense(k), _dense(v)
    if fused and _flash_applies(q, mask, causal):
        k, v = (_per_head(x, q.shape[1]) for x in (k, v))
        out, logsumexp = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
        return out.float(), logsumexp
    q, k, v = wide(q), _per_head(wide(k), q.shape[1]), _per_head(wide(v), q.shape[1])
    if not fused or q.device.type != "cpu":
        return _tiled(q, k, v, mask, causal)
    mask = None if mask is None else mask.to(q.dtype)
    out, logsumexp = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    if mask is not None:  # torch's log-sum-exp of a row without keys is 0
        logsumexp = logsumexp.masked_fill(mask.amax(-1) == -torch.inf, -torch.inf)
    return out, logsumexp


def block_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    causal: bool,
    fused: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's part of the gradients of `q`, `k` and `v`, in their shapes.

    `d_out` and `out` (`[B, H, T, K]`) and `logsumexp` (`[B, H, T]`) belong to attention over all keys, of which this
    block has some: its probabilities are `P = exp(scores - logsumexp)`, and with `dP = d_out v^T` the gradients are
    `d_v = P^T d_out`, `dS = P * (dP - rowsum(d_out * out))`, `d_q = dS k / sqrt(K)` and `d_k = dS^T q / sqrt(K)`. Every
    query must see a key in some block. The other arguments are those of `block_attention`.
    """
    causal = causal and mask is None
    heads, kv_heads = q.shape[1], k.shape[1]
    d_out, q, k, v = _dense(d_out), _dense(q), _dense(k), _dense(v)
    if fused and _flash_applies(q, mask, causal):
        k, v, d_out, out = _per_head(k, heads), _per_head(v, heads), d_out.to(q.dtype), out.to(q.dtype)
        seed, offset = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in (2, ()))  # of dropout
        d_q, d_k, d_v = _ATEN._scaled_dot_product_flash_attention_backward(
            *(d_out, q, k, v, out, logsumexp.contiguous(), None, None, q.shape[2], k.shape[2]),
            *(0.0, causal, seed, offset),
        )
    else:
        d_out, q, k, v = wide(d_out), wide(q), _per_head(wide(k), heads), _per_head(wide(v), heads)
        if not fused or q.device.type != "cpu":
            d_q, d_k, d_v = _tiled_backward(d_out, q, k, v, out, logsumexp, mask, causal)
        else:
            d_q, d_k, d_v = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
                *(d_out, q, k, v, out, logsumexp, 0.0, causal),
                attn_mask=None if mask is None else mask.to(q.dtype),
            )
    return wide(d_q), _per_kv_head(d_k, kv_heads), _per_kv_head(d_v, kv_heads)


def wide(x: Tensor) -> Tensor:
    """Return `x` in fp32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def _flash_applies(q: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Return whether torch's flash attention on a GPU can compute a block. It takes bf16 and fp16, and no mask."""
    return (
        q.device.type == "cuda"
        and mask is None
        and q.shape[-1] % 8 == 0  # otherwise torch would pad the heads before this operation
        and can_use_flash_attention(SDPAParams(q, q, q, None, 0.0, causal, False))
    )


def _dense(x: Tensor) -> Tensor:
    """Return `x` with the numbers of a head next to each other: torch's kernels do not check it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Return keys or values repeated for each query head of their group: not every version of the kernels does it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _per_kv_head(gradient: Tensor, kv_heads: int) -> Tensor:
    """Sum the gradients of repeated keys or values over each group's query heads."""
    gradient = wide(gradient)
    return gradient if gradient.shape[1] == kv_heads else gradient.unflatten(1, (kv_heads, -1)).sum(2)


# ---------------------------------------------------------------------------------------------------- tiles


def _tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    out, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for rows in _tiles(q, k):
        scores = _scores(q, k, mask, causal, rows)
        logsumexp[:, :, rows] = scores.logsumexp(-1)
        out[:, :, rows] = _probabilities(scores, logsumexp[:, :, rows]) @ v
    return out, logsumexp


def _tiled_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale = 1.0 / math.sqrt(q.shape[-1])
    for rows in _tiles(q, k):
        probabilities = _probabilities(_scores(q, k, mask, causal, rows), logsumexp[:, :, rows])
        upstream = d_out[:, :, rows]
        d_v += probabilities.mT @ upstream
        d_scores = upstream @ v.mT
        d_scores -= (upstream * out[:, :, rows]).sum(-1, keepdim=True)
        d_scores *= probabilities
        d_scores *= scale
        d_q[:, :, rows] = d_scores @ k
        d_k += d_scores.mT @ q[:, :, rows]
    return d_q, d_k, d_v


def _tiles(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Yield slices of query rows whose scores take at most `SCORE_TILE_BYTES`, or one row."""
    batch, heads, length, _ = q.shape
    rows = max(1, SCORE_TILE_BYTES // (batch * heads * k.shape[2] * q.element_size()))
    return (slice(start, start + rows) for start in range(0, length, rows))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, rows: slice) -> Tensor:
    """Return the masked, scaled scores of some query rows."""
    scores = q[:, :, rows] @ k.mT
    scores /= math.sqrt(q.shape[-1])
    if mask is not None:
        scores += mask[:, :, rows]
    elif causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(rows.start + 1)
        scores.masked_fill_(hidden, -torch.inf)
    return scores


def _probabilities(scores: Tensor, logsumexp: Tensor) -> Tensor:
    """Return `exp(scores - logsumexp)` in the memory of `scores`; zeros where `logsumexp` is -inf."""
    return scores.sub_(logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)[..., None]).exp_()

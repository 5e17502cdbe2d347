"""Causal attention, by PyTorch's own operations; within documents where rows hold several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn import functional as F

from megatrain.kernels import SHORT_DOCUMENT


class Documents:
    """The lengths of the documents in a batch of rows `[B, T]`, whose tokens attend within their document only.

    `lengths` has the lengths of each row's documents in tokens, in order; they sum to T. They are numbers on the host,
    so that attention can cut the rows without waiting for a device. `offsets` has the documents' ends for the device's
    kernels: int32 `[N + 1]` for N documents, from 0 to B T, over the rows one after another.
    """

    # No dataclass: torch.compile would compile a block again for other lengths.
    def __init__(self, lengths: Iterable[Sequence[int]], offsets: Tensor | None = None) -> None:
        self.lengths = [list(row) for row in lengths]
        in_order = list(chain.from_iterable(self.lengths))
        assert min(in_order) > 0 and len({sum(row) for row in self.lengths}) == 1, self.lengths
        self.longest = max(in_order)
        self.offsets = torch.tensor([0, *accumulate(in_order)], dtype=torch.int32) if offsets is None else offsets

    @property
    def are_whole_rows(self) -> bool:
        """Whether each row is one document."""
        return all(len(row) == 1 for row in self.lengths)

    def to(self, device: torch.device, non_blocking: bool = False) -> Documents:
        """Return a copy with its tensor on `device`."""
        return Documents(self.lengths, self.offsets.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Documents:
        """Return a copy with its tensor in pinned memory."""
        return Documents(self.lengths, self.offsets.pin_memory())

    def ids(self) -> Tensor:
        """Return the number of each token's document, int64 `[B, T]`, counted over all rows."""
        rows, length = len(self.lengths), sum(self.lengths[0])
        places = torch.arange(rows * length, dtype=torch.int32, device=self.offsets.device)
        return torch.bucketize(places, self.offsets[1:], right=True).view(rows, length)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None = None, dropout: float = 0.0) -> Tensor:
    """Return `softmax(q k^T / sqrt(K)) v` for each head (Vaswani et al., 2017, arXiv:1706.03762).

    `q` is `[B, H, T, K]`, `k` and `v` `[B, Hkv, S, K]` with `Hkv` a divisor of `H` (grouped-query attention: each
    key-value head serves `H / Hkv` neighbouring query heads); returns `[B, H, T, K]`. `mask` is broadcastable to
    `[B, H, T, S]`: either bool, true where a query may attend to a key, or of q's dtype and added to the scores.
    Without a mask, attention is causal, the last query is at the last key's position, and `T` must be `S` or 1. With
    `Documents` (`T` is `S`) it is causal within each; `attends_by_document` says where that is possible.
    `dropout` is the probability of dropping an attention weight.

    Gradients, with `P` the softmax, `g` the gradient of the output and `dP = g v^T`: `d_v = P^T g`,
    `dS = P * (dP - rowsum(dP * P))`, `d_q = dS k / sqrt(K)`, `d_k = dS^T q / sqrt(K)`.
    """
    if isinstance(mask, Documents):
        return _packed(q, k, v, mask) if q.is_cuda else _one_by_one(q, k, v, mask, dropout)
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


def attends_by_document(device: torch.device, dtype: torch.dtype, head_size: int, dropout: float) -> bool:
    """Return whether `attention` can take `Documents`. Otherwise it needs their `document_mask`, which is T x T."""
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    is_supported = dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256
    return is_supported and dropout == 0.0 and torch.cuda.get_device_capability(device) >= (8, 0)


# Not compiled, because the graph would be another for other lengths. `torch.compiler.disable` would import the compiler
# here, which takes seconds; this does so at the first call.
@torch._disable_dynamo
def _one_by_one(q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float) -> Tensor:
    """Attend with a call for each document. `split` is used because the gradient of many slices would be slow."""
    results = []
    for lengths, *row in zip(documents.lengths, q.split(1), k.split(1), v.split(1), strict=True):
        for length, *document in zip(lengths, *(x.split(lengths, dim=2) for x in row), strict=True):
            dtype = torch.float32 if length <= SHORT_DOCUMENT and q.element_size() == 2 else q.dtype
            one_q, one_k, one_v = (x.to(dtype) for x in document)
            results.append(attention(one_q, one_k, one_v, None, dropout).to(q.dtype).transpose(1, 2))
    # tokens before heads in memory, as the output projection reads them
    y = torch.cat(results, dim=1).squeeze(0)
    return y.view(len(q), -1, *y.shape[1:]).transpose(1, 2)


def _packed(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attend with one call for all documents: flash attention of sequences of any length."""
    from torch.nn.attention.varlen import varlen_attn  # imports the compiler, which takes seconds

    if q.shape[1] != k.shape[1]:  # torch 2.11 has no grouped-query form of it
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    flat_q, flat_k, flat_v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))
    ends, longest = documents.offsets, documents.longest
    causal = (-1, 0)  # any number of keys before the query, none after it
    y = varlen_attn(flat_q, flat_k, flat_v, ends, ends, longest, longest, window_size=causal)
    assert isinstance(y, Tensor)
    return y.view(len(q), -1, *y.shape[1:]).transpose(1, 2)


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

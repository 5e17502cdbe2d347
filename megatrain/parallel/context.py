"""Context parallelism: sequences sharded over ranks, and attention across the shards.

Everything except attention works on each token alone, so a rank runs the whole model on its slice of each sequence,
and only attention is replaced. Ulysses trades the slice of the sequence for a slice of the heads, by all-to-all. The
ring keeps all heads and passes keys and values from rank to rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.data.batch import MicroBatch
from megatrain.kernels.attention import Documents, attention
from megatrain.model.gpt import GPT

Attend = Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]
"""`kernels.attention.attention` on this rank's slice of queries, keys and values, with the whole sequence's mask.

The ring takes no `Documents` as a mask.
"""


def split_sequences(model: GPT, kind: str, group: dist.ProcessGroup) -> None:
    """Let a model attend across the ranks of a context group, whose ranks run it on slices of the sequences."""
    model.needs_dense_mask = kind == "ring"
    for block in model.blocks.children():
        block.attn.attend = make_attend(kind, group)  # type: ignore[union-attr]


def make_attend(kind: str, group: dist.ProcessGroup) -> Attend:
    """Return attention across the ranks of a context group; `kind` is `ulysses` or `ring`."""
    return Ulysses(group) if kind == "ulysses" else Ring(group)


def positions_of(kind: str, seq_len: int, cp_rank: int, cp_size: int) -> Tensor:
    """Return the sequence positions of a rank's tokens, int64 `[T / cp]`, in the order in which it holds them.

    Ulysses: one contiguous slice. Ring: the sequence is cut into 2 cp chunks, and rank i holds chunks i and
    2 cp - 1 - i, which gives every rank the same number of query-key pairs below the diagonal.
    """
    if kind == "ulysses":
        return torch.arange(seq_len).chunk(cp_size)[cp_rank]
    chunks = torch.arange(seq_len).chunk(2 * cp_size)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


def local_slice(micro_batch: MicroBatch, kind: str, cp_rank: int, cp_size: int) -> MicroBatch:
    """Return a rank's slice of a micro-batch, with the tokens' positions in the whole sequence.

    Documents stay whole, because attention covers the whole sequence.
    """
    tokens = micro_batch.tokens
    own = positions_of(kind, tokens.shape[1], cp_rank, cp_size).to(tokens.device)

    def cut(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:, own].contiguous()

    positions = own if micro_batch.positions is None else cut(micro_batch.positions)
    return replace(
        micro_batch,
        tokens=tokens[:, own].contiguous(),
        labels=micro_batch.labels[:, own].contiguous(),
        positions=positions,
        loss_weights=cut(micro_batch.loss_weights),
    )


# ---------------------------------------------------------------------------------------------------- ulysses


class Ulysses:
    """Each rank attends over the whole sequence with its share of the heads (Jacobs et al., 2023, arXiv:2309.14509)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None, dropout: float) -> Tensor:
        """Return attention's output `[B, H, T / cp, K]`.

        `q` is `[B, H, T / cp, K]`, `k` and `v` `[B, Hkv, T / cp, K]`; `mask` covers the whole sequence.
        """
        q, k, v = (exchange(x, self.group, scatter=1, gather=2) for x in (q, k, v))
        if isinstance(mask, Tensor) and mask.shape[1] > 1:
            mask = mask.chunk(self.group.size(), dim=1)[self.group.rank()]
        y = attention(q, k, v, mask, dropout)
        return exchange(y, self.group, scatter=2, gather=1)


def exchange(x: Tensor, group: dist.ProcessGroup, scatter: int, gather: int) -> Tensor:
    """Exchange parts of `x` by all-to-all: split along `scatter`, concatenate along `gather`. Differentiable."""
    apply: Callable[..., Tensor] = _Exchange.apply
    return apply(x, group, scatter, gather)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, scatter: int, gather: int) -> Tensor:
        ctx.group, ctx.scatter, ctx.gather = group, scatter, gather
        return _all_to_all(x, group, scatter, gather)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _all_to_all(gradients[0], ctx.group, ctx.gather, ctx.scatter), None, None, None


def _all_to_all(x: Tensor, group: dist.ProcessGroup, scatter: int, gather: int) -> Tensor:
    sent = torch.stack(x.chunk(group.size(), dim=scatter))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(0), dim=gather)


# ---------------------------------------------------------------------------------------------------- ring


class Ring:
    """Each rank keeps its queries while keys and values travel round the ring (Liu et al., 2023, arXiv:2310.01889).

    Partial results are merged by online softmax, in fp32. Blocks of chunks above the diagonal are never computed.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.blocks_computed = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Attend with the shapes of `Ulysses`; tokens are in the order of `positions_of("ring", ...)`."""
        assert dropout == 0.0, "the layout table refuses ring attention with dropout"
        apply: Callable[..., Tensor] = _RingAttention.apply
        return apply(q, k, v, mask, self)

    def pass_on(self, tensors: list[Tensor]) -> list[Tensor]:
        """Send tensors to the next rank of the ring and return those received from the previous one."""
        size, rank = self.group.size(), self.group.rank()
        tensors = [tensor.contiguous() for tensor in tensors]
        received = [torch.empty_like(tensor) for tensor in tensors]
        operations = []
        for tag, (out, into) in enumerate(zip(tensors, received, strict=True)):
            following, previous = (rank + 1) % size, (rank - 1) % size
            operations.append(dist.P2POp(dist.isend, out, group=self.group, group_peer=following, tag=tag))
            operations.append(dist.P2POp(dist.irecv, into, group=self.group, group_peer=previous, tag=tag))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return received

    def blocks(self, owner: int) -> list[tuple[int, int, int, int]]:
        """Return the blocks on or below the diagonal between this rank's queries and the owner's keys.

        Each is (query half, key half, query chunk, key chunk).
        """
        size, rank = self.group.size(), self.group.rank()
        query_chunks, key_chunks = (rank, 2 * size - 1 - rank), (owner, 2 * size - 1 - owner)
        return [(i, j, a, b) for i, a in enumerate(query_chunks) for j, b in enumerate(key_chunks) if b <= a]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, query_chunk: int, key_chunk: int) -> Tensor:
    """Return one block's masked, scaled scores, fp32 `[B, Hkv, H / Hkv, t, t]`; `q` is `[B, Hkv, H / Hkv, t, K]`."""
    length = q.shape[-2]
    scores = q @ k.unsqueeze(2).transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        rows, columns = (slice(chunk * length, (chunk + 1) * length) for chunk in (query_chunk, key_chunk))
        part = mask[..., rows, columns]
        part = torch.unflatten(part, 1, (k.shape[1], -1)) if part.shape[1] > 1 else part.unsqueeze(1)
        return scores + part
    if query_chunk == key_chunk:
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~causal, -torch.inf)
    return scores


def _halves(x: Tensor, heads: int) -> list[Tensor]:
    """Return the two chunks of a rank's slice, each `[B, Hkv, H / Hkv, t, K]`, heads grouped by key-value head."""
    return list(torch.unflatten(_wide(x), 1, (heads, -1)).chunk(2, dim=-2))


def _wide(x: Tensor) -> Tensor:
    """Return `x` in fp32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ring: Ring) -> Tensor:
        size, rank = ring.group.size(), ring.group.rank()
        queries = _halves(q, k.shape[1])
        outputs = [torch.zeros_like(part) for part in queries]
        logsumexps = [part.new_full(part.shape[:-1], -torch.inf) for part in queries]
        keys, values = k, v
        for turn in range(size):
            key_halves, value_halves = (_wide(x).chunk(2, dim=-2) for x in (keys, values))
            for i, j, a, b in ring.blocks((rank - turn) % size):
                scores = _scores(queries[i], key_halves[j], mask, a, b)
                ring.blocks_computed += 1
                merged = torch.logaddexp(logsumexps[i], scores.logsumexp(dim=-1))
                safe = merged.masked_fill(merged == -torch.inf, 0.0)  # rows whose keys so far are all masked
                weights = (scores - safe[..., None]).exp()
                kept = (logsumexps[i] - safe).exp()[..., None]
                outputs[i] = outputs[i] * kept + weights @ value_halves[j].unsqueeze(2)
                logsumexps[i] = merged
            if turn + 1 < size:
                keys, values = ring.pass_on([keys, values])
        ctx.ring, ctx.mask = ring, mask
        out = torch.cat(outputs, dim=-2)
        ctx.save_for_backward(q, k, v, out, torch.cat(logsumexps, dim=-1))
        return out.flatten(1, 2).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v, out, logsumexp = ctx.saved_tensors
        ring, mask = ctx.ring, ctx.mask
        size, rank = ring.group.size(), ring.group.rank()
        scale = 1.0 / math.sqrt(q.shape[-1])
        queries, upstream = _halves(q, k.shape[1]), _halves(gradients[0], k.shape[1])
        totals = list(logsumexp.chunk(2, dim=-1))
        # rowsum(dP * P) of attention's gradient is rowsum(d_out * out)
        diagonals = [(g * o).sum(-1, keepdim=True) for g, o in zip(upstream, out.chunk(2, dim=-2), strict=True)]
        d_queries = [torch.zeros_like(part) for part in queries]
        keys, values = k, v
        d_keys, d_values = torch.zeros_like(_wide(k)), torch.zeros_like(_wide(v))
        for turn in range(size):
            key_halves, value_halves = (_wide(x).chunk(2, dim=-2) for x in (keys, values))
            d_key_halves, d_value_halves = d_keys.chunk(2, dim=-2), d_values.chunk(2, dim=-2)
            for i, j, a, b in ring.blocks((rank - turn) % size):
                scores = _scores(queries[i], key_halves[j], mask, a, b)
                probabilities = (scores - totals[i][..., None]).exp()
                d_probabilities = upstream[i] @ value_halves[j].unsqueeze(2).transpose(-1, -2)
                d_scores = probabilities * (d_probabilities - diagonals[i]) * scale
                d_value_halves[j].add_((probabilities.transpose(-1, -2) @ upstream[i]).sum(2))
                d_key_halves[j].add_((d_scores.transpose(-1, -2) @ queries[i]).sum(2))
                d_queries[i] += d_scores @ key_halves[j].unsqueeze(2)
            # gradients travel with their keys and values, round the ring and back to their owner
            if turn + 1 < size:
                keys, values, d_keys, d_values = ring.pass_on([keys, values, d_keys, d_values])
            else:
                d_keys, d_values = ring.pass_on([d_keys, d_values])
        d_query = torch.cat(d_queries, dim=-2).flatten(1, 2)
        return d_query.to(q.dtype), d_keys.to(k.dtype), d_values.to(v.dtype), None, None

"""Context parallelism: sequences sharded over ranks, and attention across the shards.

Everything except attention works on each token alone, so a rank runs the whole model on its slice of each sequence,
and only attention is replaced. Ulysses trades the slice of the sequence for a slice of the heads, by all-to-all. The
ring keeps all heads and passes keys and values from rank to rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, library
from torch.distributed.distributed_c10d import _resolve_process_group

from megatrain.data.batch import MicroBatch
from megatrain.kernels.attention import Documents, attention
from megatrain.kernels.block_attention import block_attention, block_attention_backward
from megatrain.model.gpt import GPT

Attend = Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]
"""`kernels.attention.attention` on this rank's slice of queries, keys and values, with the whole sequence's mask.

The ring takes no `Documents` as a mask.
"""


def split_sequences(model: GPT, kind: str, group: dist.ProcessGroup) -> None:
    """Let a model attend across the ranks of a context group, whose ranks run it on slices of the sequences."""
    model.needs_dense_mask = kind == "ring"
    model.context_size, model.context_sum = group.size(), partial(_summed, group=group)
    for block in model.blocks.children():
        block.attn.attend = make_attend(kind, group)  # type: ignore[union-attr]


def _summed(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    apply: Callable[..., Tensor] = _Sum.apply
    return apply(values, group)


class _Sum(torch.autograd.Function):
    """Sum over a group whose ranks each return an equal share of one loss, computed from the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the sum over the ranks of the group, in the shape of `values`."""
        total = values.clone()
        dist.all_reduce(total, group=group)
        ctx.size = group.size()
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of the whole loss: the gradients of all ranks' shares are equal."""
        return gradients[0] * ctx.size, None


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
        old_log_probs=cut(micro_batch.old_log_probs),
        advantages=cut(micro_batch.advantages),
        reference_log_probs=cut(micro_batch.reference_log_probs),
        old_values=cut(micro_batch.old_values),
        returns=cut(micro_batch.returns),
        pairs=micro_batch.pairs and micro_batch.pairs.slice(own, cp_rank == 0),
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
    """All-to-all that cuts dimension `scatter` and joins dimension `gather`; the reverse in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, scatter: int, gather: int) -> Tensor:
        """Return `x` with `scatter` divided, and `gather` multiplied, by the ranks of the group."""
        ctx.group, ctx.scatter, ctx.gather = group, scatter, gather
        return _all_to_all(x, group, scatter, gather)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of `x`, in its shape."""
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

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """Attend with the shapes of `Ulysses`; tokens are in the order of `positions_of("ring", ...)`.

        A mask is added to the scores, and lets each token attend at least to itself.
        """
        assert dropout == 0.0, "the layout table refuses ring attention with dropout"
        out: Tensor = _ring_attention(q, k, v, mask, self.group.group_name)[0]
        return out.to(q.dtype)

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

    def blocks(self, turn: int) -> list[tuple[int, int, int, int]]:
        """Return the blocks on or below the diagonal between this rank's queries and the keys that it has in a turn.

        Each is (query half, key half, query chunk, key chunk).
        """
        size, rank = self.group.size(), self.group.rank()
        owner = (rank - turn) % size
        query_chunks, key_chunks = (rank, 2 * size - 1 - rank), (owner, 2 * size - 1 - owner)
        return [(i, j, a, b) for i, a in enumerate(query_chunks) for j, b in enumerate(key_chunks) if b <= a]


def ring_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: str) -> tuple[Tensor, Tensor]:
    """Return attention's output `[B, H, T / cp, K]` and the log-sum-exps `[B, H, T / cp]`, in fp32.

    The shapes are those of `Ring`; `group` is the name of its process group.
    """
    ring, (out, logsumexp) = _ring(group), _results(q)
    out.zero_()
    logsumexp.fill_(-torch.inf)
    queries, outs, logsumexps = _halves(q), _halves(out), _halves(logsumexp)
    for turn in range(ring.group.size()):
        if turn > 0:
            k, v = ring.pass_on([k, v])
        keys, values = _halves(k), _halves(v)
        for i, j, a, b in ring.blocks(turn):
            part = _part(mask, a, b, queries[i].shape[2])
            _merge_(outs[i], logsumexps[i], *block_attention(queries[i], keys[j], values[j], part, a == b))
    return out, logsumexp


def ring_attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, logsumexp: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `q`, `k` and `v`, in their shapes and formats.

    Those of keys and values travel with them, round the ring and back to their owner.
    """
    ring, dtype = _ring(group), q.dtype
    d_q, d_k, d_v = (torch.zeros(x.shape, dtype=out.dtype, device=x.device) for x in (q, k, v))
    queries, outs, logsumexps, upstreams, d_queries = map(_halves, (q, out, logsumexp, d_out, d_q))
    for turn in range(ring.group.size()):
        if turn > 0:
            k, v, d_k, d_v = ring.pass_on([k, v, d_k, d_v])
        keys, values, d_keys, d_values = map(_halves, (k, v, d_k, d_v))
        for i, j, a, b in ring.blocks(turn):
            part = _part(mask, a, b, queries[i].shape[2])
            block = (upstreams[i], queries[i], keys[j], values[j], outs[i], logsumexps[i], part, a == b)
            _add_((d_queries[i], d_keys[j], d_values[j]), block_attention_backward(*block))
    d_k, d_v = ring.pass_on([d_k, d_v])
    return d_q.to(dtype), d_k.to(dtype), d_v.to(dtype)


# Each direction is one operator, so that selective recompute keeps the result and does not repeat the turns.
_ring_attention = library.custom_op("megatrain::ring_attention", ring_attention, mutates_args=())
_ring_attention_backward = library.custom_op(
    "megatrain::ring_attention_backward", ring_attention_backward, mutates_args=()
)


@_ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, group: str) -> tuple[Tensor, Tensor]:
    return _results(q)


@_ring_attention_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, logsumexp: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, str], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.group = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradient(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_ring_attention_backward(d_out, *ctx.saved_tensors, ctx.group), None, None


_ring_attention.register_autograd(_gradient, setup_context=_save)


def _ring(group: str) -> Ring:
    return Ring(_resolve_process_group(group))  # type: ignore[arg-type]  # the name's type is not public


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return uninitialised results of attention for queries `[B, H, T / cp, K]`."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:-1], dtype=dtype)


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """Return the two chunks of a rank's slice of the sequence, dimension 2."""
    return x.chunk(2, dim=2)


def _part(mask: Tensor | None, query_chunk: int, key_chunk: int, length: int) -> Tensor | None:
    """Return the mask of one block of chunks of `length` tokens."""
    if mask is None:
        return None
    rows, columns = (slice(chunk * length, (chunk + 1) * length) for chunk in (query_chunk, key_chunk))
    return mask[..., rows, columns]


def _merge_(out: Tensor, logsumexp: Tensor, part: Tensor, part_logsumexp: Tensor) -> None:
    """Merge a block's result into that of the blocks before it, in place."""
    merged = torch.logaddexp(logsumexp, part_logsumexp)
    safe = merged.masked_fill(merged == -torch.inf, 0.0)  # rows whose keys so far are all masked
    out.mul_((logsumexp - safe).exp_()[..., None]).add_(part.mul_((part_logsumexp - safe).exp_()[..., None]))
    logsumexp.copy_(merged)


def _add_(totals: tuple[Tensor, ...], parts: tuple[Tensor, ...]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)

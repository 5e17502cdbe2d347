"""The loss of distillation: a student's cross-entropy, mixed with its divergence from a teacher's distribution.

The plain reference, and versions that hold the teacher's logits a chunk of rows at a time, with the gradient of the sum
computed beside the loss. Where the vocabulary is cut over ranks, `merge` combines their parts of a row.

Shapes: N tokens, V columns of the vocabulary on this rank, D the student's width, E the teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatrain.kernels import CHUNK_BYTES, CUDA_CHUNK_BYTES, WORKING_COPIES
from megatrain.kernels.cross_entropy import label_weights, row_chunks
from megatrain.kernels.linear import product
from megatrain.kernels.linear_cross_entropy import add_chunk_product, padding_rows

Sums = tuple[Tensor, Tensor, Tensor]
"""Three fp32 scalars over all tokens: the loss, which has a gradient, the cross-entropy and the divergence in nats."""


@dataclass(frozen=True)
class Teaching:
    """What a teacher says of some tokens, and how it counts.

    Its logits are `hidden` `[..., E]` times `weight` `[V, E]`. With the teacher's distribution `p` and the student's
    `q`, both at `temperature` T, a token's loss is `(1 - share) cross-entropy + share T^2 D`; the factor keeps the
    size of gradients (Hinton et al., 2015, arXiv:1503.02531). D is `KL(p || q)` for `mix = 0`, `KL(q || p)` for 1, and
    between them the generalised Jensen-Shannon divergence `mix KL(p || m) + (1 - mix) KL(q || m)` from
    `m = mix p + (1 - mix) q` (Agarwal et al., 2023, arXiv:2306.13649).
    """

    hidden: Tensor
    weight: Tensor
    temperature: float = 1.0
    share: float = 0.5
    mix: float = 0.0

    def rows(self, part: slice) -> Tensor:
        """Return the teacher's logits of some of the tokens, in their own dtype."""
        return product(self.hidden.flatten(0, -2)[part], self.weight.t())


@dataclass(frozen=True)
class Merge:
    """Functions that combine a row's statistics over the ranks that hold parts of it; by default there is one rank."""

    largest: Callable[[Tensor], Tensor] = lambda values: values
    total: Callable[[Tensor], Tensor] = lambda values: values


ALONE = Merge()


def linear_distillation(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, teaching: Teaching) -> Sums:
    """Return the sums for the student's logits `x weight^T`, of `x` `[..., D]` and `weight` `[V, D]`.

    `labels` are integers `[...]`, `weights` float `[...]` or None for 1 each. Labels equal to `IGNORE_INDEX` add
    nothing.
    """
    factors, valid = label_weights(labels.flatten(), None if weights is None else weights.flatten())
    logits = F.linear(x, weight).flatten(0, -2).float()
    own = F.log_softmax(logits / teaching.temperature, dim=-1)
    theirs = F.log_softmax(teaching.rows(slice(None)).float() / teaching.temperature, dim=-1)
    mix = teaching.mix
    if mix in (0, 1):
        pairs = [(theirs, own)] if mix == 0 else [(own, theirs)]
        parts = [1.0]
    else:
        middle = torch.logaddexp(theirs + math.log(mix), own + math.log1p(-mix))
        pairs, parts = [(theirs, middle), (own, middle)], [mix, 1 - mix]
    kinds = [F.kl_div(q, p, reduction="none", log_target=True).sum(-1) for p, q in pairs]
    divergence = sum(part * kind for part, kind in zip(parts, kinds, strict=True))
    cross_entropy = F.cross_entropy(logits, labels.flatten().where(valid, 0), reduction="none")
    ce, kl = (cross_entropy * factors).sum(), (divergence * factors).sum()
    return _mixed(ce, kl, teaching), ce.detach(), kl.detach()


def chunked_linear_distillation(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    teaching: Teaching,
    chunk_bytes: int | None = None,
) -> Sums:
    """Compute `linear_distillation` over chunks of rows, loss and gradients together. Any device, any dtype.

    As in `chunked_linear_cross_entropy_sum`, memory holds the logits of one chunk and the two gradients, and the
    backward pass, which runs only once, scales these.
    """
    needs = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    apply: Callable[..., Sums] = _Linear.apply
    flat = None if weights is None else weights.flatten()
    return apply(x.flatten(0, -2), weight, labels.flatten(), flat, teaching, chunk_bytes, needs)


def distillation_of_logits(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    teaching: Teaching,
    first: int = 0,
    vocab: int | None = None,
    merge: Merge = ALONE,
) -> Sums:
    """Compute the sums from the student's logits `[..., V]`, and OVERWRITE these with their gradient if they need one.

    The columns are those of the ids from `first` on, of `vocab` in all (None: all are here), and `teaching.weight` has
    the same ones. Only the teacher's logits are computed in chunks.
    """
    apply: Callable[..., Sums] = _OfLogits.apply
    flat = None if weights is None else weights.flatten()
    return apply(logits, labels.flatten(), flat, teaching, first, vocab or logits.shape[-1], merge)


@torch.no_grad()
def distillation_with_gradient_(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    factors: Tensor,
    teaching: Teaching,
    first: int = 0,
    merge: Merge = ALONE,
) -> tuple[Tensor, Tensor]:
    """Return each token's cross-entropy and divergence, fp32 `[N]`, and OVERWRITE `logits` with the sum's gradient.

    `logits` and `teacher` are `[N, V]`, `labels` integers `[N]`, `factors` float `[N]`, 0 where a label does not count.
    With `z = logits / T` the gradients of the divergences by `z` are `q - p`, `q (log q - log p - D)`, and
    `q (g - sum q g)` for `g = (1 - mix) (log q - log m)`.
    """
    temperature, share, mix = teaching.temperature, teaching.share, teaching.mix
    z, y = logits.float(), teacher.float()
    top = merge.largest(torch.stack([_largest(z), _largest(y)]))
    z, y = z - top[0][:, None], y - top[1][:, None]
    columns = labels - first
    is_local = (columns >= 0) & (columns < z.shape[-1])
    at_label = columns.where(is_local, 0)[:, None]
    own_label = z.gather(1, at_label)[:, 0] if z.shape[-1] else z.new_zeros(len(z))
    gradient = z.exp()
    log_q, log_p = z.div_(temperature), y.div_(temperature)
    sums = torch.stack([gradient.sum(-1), log_q.exp().sum(-1), log_p.exp().sum(-1), own_label.where(is_local, 0.0)])
    sums = merge.total(sums)
    cross_entropy = sums[0].log() - sums[3]
    gradient.mul_(((1 - share) / sums[0])[:, None])
    if z.shape[-1]:
        gradient.scatter_add_(1, at_label, (is_local * (share - 1.0)).to(gradient.dtype)[:, None])
    log_q.sub_(sums[1].log()[:, None])
    log_p.sub_(sums[2].log()[:, None])
    q = log_q.exp()
    if mix == 0:
        p = log_p.exp()
        divergence = merge.total((p * log_p.sub_(log_q)).sum(-1))
        gradient.add_(q.sub_(p), alpha=share * temperature)
    elif mix == 1:
        gap = log_q.sub_(log_p)
        divergence = merge.total((q * gap).sum(-1))
        gradient.add_(q.mul_(gap.sub_(divergence[:, None])), alpha=share * temperature)
    else:
        middle = torch.logaddexp(log_p + math.log(mix), log_q + math.log1p(-mix))
        from_teacher = (log_p.exp() * log_p.sub_(middle)).sum(-1)
        gap = log_q.sub_(middle)
        from_student = (q * gap).sum(-1)
        from_teacher, from_student = merge.total(torch.stack([from_teacher, from_student]))
        divergence = mix * from_teacher + (1 - mix) * from_student
        gradient.add_(q.mul_(gap.sub_(from_student[:, None])), alpha=share * temperature * (1 - mix))
    logits.copy_(gradient.mul_(factors[:, None]))
    return cross_entropy, divergence


class _Linear(torch.autograd.Function):
    """The sums of `chunked_linear_distillation`, and the gradients of `x` and `weight`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        teaching: Teaching,
        chunk_bytes: int | None,
        needs: bool,
    ) -> Sums:
        """Return the sums for `x` `[N, D]`, `weight` `[V, D]`, `labels` and `weights` `[N]`."""
        vocab, padding = len(weight), padding_rows(weight)
        table = F.pad(weight, (0, 0, 0, padding)) if padding else weight
        factors, _ = label_weights(labels, weights)
        d_x, d_table = torch.empty_like(x), None
        ce, kl = (torch.zeros((), dtype=torch.float32, device=x.device) for _ in range(2))
        for part in _parts(x, vocab, chunk_bytes):
            chunk, theirs = product(x[part], table.t()), teaching.rows(part)
            for rows in row_chunks(theirs):
                some = slice(part.start + rows.start, min(part.start + rows.stop, part.stop))
                own = chunk[rows, :vocab]
                found = distillation_with_gradient_(own, theirs[rows], labels[some], factors[some], teaching)
                ce, kl = ce + (found[0] * factors[some]).sum(), kl + (found[1] * factors[some]).sum()
            if needs:
                product(chunk, table, out=d_x[part])
                d_table = add_chunk_product(d_table, chunk.t(), x[part])
            del chunk, theirs  # free them before the next chunk is allocated
        if needs:
            ctx.save_for_backward(d_x, torch.zeros_like(table) if d_table is None else d_table)
            ctx.dtype, ctx.vocab = weight.dtype, vocab
        ctx.mark_non_differentiable(ce, kl)
        return _mixed(ce, kl, teaching), ce, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of `x` and `weight` for that of the loss."""
        d_x, d_table = ctx.saved_tensors
        d_x = d_x * gradients[0] if ctx.needs_input_grad[0] else None
        d_weight = d_table[: ctx.vocab].mul_(gradients[0]).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, None, None, None, None, None


class _OfLogits(torch.autograd.Function):
    """The sums of `distillation_of_logits`, and the gradient of the logits, in their own memory."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        teaching: Teaching,
        first: int,
        vocab: int,
        merge: Merge,
    ) -> Sums:
        """Return the sums for `logits` `[..., V]`, `labels` and `weights` `[N]`."""
        rows = logits.detach().flatten(0, -2)
        factors, _ = label_weights(labels, weights)
        ce, kl = (torch.zeros((), dtype=torch.float32, device=logits.device) for _ in range(2))
        for part in _parts(rows, vocab):  # equal on all ranks that share the rows
            theirs = teaching.rows(part)
            own = (rows[part], theirs, labels[part], factors[part], teaching, first, merge)
            found = distillation_with_gradient_(*own)
            ce, kl = ce + (found[0] * factors[part]).sum(), kl + (found[1] * factors[part]).sum()
        ctx.rows, ctx.shape = rows, logits.shape
        ctx.mark_non_differentiable(ce, kl)
        return _mixed(ce, kl, teaching), ce, kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of the logits for that of the loss."""
        rows, ctx.rows = ctx.rows, None
        assert rows is not None, "the gradient of these logits was already returned"
        return rows.mul_(gradients[0]).view(ctx.shape), None, None, None, None, None, None


def _mixed(ce: Tensor, kl: Tensor, teaching: Teaching) -> Tensor:
    return (1 - teaching.share) * ce + teaching.share * teaching.temperature**2 * kl


def _largest(rows: Tensor) -> Tensor:
    """Return the largest value of each row; -inf where a rank has no column."""
    return rows.amax(-1) if rows.shape[-1] else rows.new_full((len(rows),), -torch.inf)


def _parts(rows: Tensor, vocab: int, chunk_bytes: int | None = None) -> Iterator[slice]:
    """Yield the slices of rows whose logits are computed at once."""
    if chunk_bytes is None:
        chunk_bytes = (CUDA_CHUNK_BYTES if rows.is_cuda else CHUNK_BYTES) // WORKING_COPIES
    size = max(1, chunk_bytes // (max(1, vocab) * rows.element_size()))
    return (slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size))

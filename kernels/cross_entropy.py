"""Cross-entropy of next-token prediction. Summing, not averaging: the step divides, over all ranks.

Three forms, each as a plain reference and fused: the summed loss with its gradient by autograd; the losses with the
gradient written over the logits, where nobody needs them afterwards; and the two halves of both, statistics and
gradient, for logits whose vocabulary is cut over ranks (no communication here: megatrain/parallel/vocabulary.py).

N is the number of tokens, V that of logits a token has here, `lse` the logarithm of the sum of exponentials. The
z-loss, `z_loss * lse^2` for each label, keeps `lse` near 0 (Chowdhery et al., 2022, arXiv:2204.02311, section 5). With
it the loss of one label is `weight * (lse - logit[label] + z_loss * lse^2)`, and its gradient
`weight * (p * (1 + 2 z_loss lse) - onehot(label))`, `p = softmax(logits)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional as F

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.support import (
    as_rows,
    compute_dtype,
    compute_type,
    launch,
    next_power_of_2,
    num_warps,
    require,
    rounded,
    tl,
    triton,
)

_CPU_CHUNK = 2**18
"""Logits that the references handle at once: 1 MiB in fp32, so that all passes but the first find them in the cache."""
_CUDA_CHUNK = 2**27
"""The same on a GPU, where launches cost more than a temporary of 512 MiB."""


def cross_entropy_sum(logits: Tensor, labels: Tensor, weights: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
    """Sum over the valid labels of `weight * (-log softmax(logits)[label] + z_loss * lse^2)`, in nats; an fp32 scalar.

    `logits` are `[..., V]` in any dtype (computed in fp32), `labels` integers `[...]`, `weights` float `[...]` or None
    for 1 each. Labels equal to `IGNORE_INDEX` add nothing; with none valid the sum is 0.

    Gradient, with `g` that of the sum and `p = softmax(logits)`:
    `d_logits = g * weight * (p * (1 + 2 z_loss lse) - onehot(label))` at valid labels, 0 elsewhere.
    """
    flat_logits, flat_labels = logits.flatten(0, -2).float(), labels.flatten()
    if weights is None and z_loss == 0:
        return F.cross_entropy(flat_logits, flat_labels, ignore_index=IGNORE_INDEX, reduction="sum")
    losses = F.cross_entropy(flat_logits, flat_labels, ignore_index=IGNORE_INDEX, reduction="none")
    if z_loss != 0:
        penalty = z_loss * flat_logits.logsumexp(dim=-1).square()
        losses = losses + penalty.where(flat_labels != IGNORE_INDEX, 0.0)
    return losses.sum() if weights is None else (losses * weights.flatten().float()).sum()


def fused_cross_entropy_sum(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> Tensor:
    """`cross_entropy_sum` with one read of the logits forward, and one read and one write backward.

    Keeps the logits and two numbers a token, never probabilities; no gradient goes to `weights`. Computed in fp32 (fp64
    for fp64, which the result then is too). A label outside the vocabulary gives NaN. Raises `KernelError` where Triton
    cannot take these tensors (`support.unsupported(logits, labels, weights)`).
    """
    flat_weights = None if weights is None else weights.flatten()
    losses, _, _ = _cross_entropy(as_rows(logits), labels.flatten(), flat_weights, z_loss)
    return losses.sum()


@torch.no_grad()
def cross_entropy_with_gradient_(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> Tensor:
    """Every token's weighted loss, fp32 `[N]`; OVERWRITES `logits` with the gradient of their sum, in their dtype.

    `logits` are `[N, V]`, `labels` integers `[N]`, `weights` float `[N]` or None for 1 each; a label of `IGNORE_INDEX`
    has loss and gradient 0. Computed in fp32, a few rows at a time, so that there is never another array of the logits'
    size; fp32 logits in place. Autograd knows nothing of it.
    """
    losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    factors, valid = _label_weights(labels, weights)
    for some in _chunks(logits):
        losses[some] = _rows_with_gradient_(logits[some], labels[some], factors[some], valid[some], z_loss)
    return losses


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Rows to handle at once, one group after the other."""
    num_rows = max(1, (_CUDA_CHUNK if logits.is_cuda else _CPU_CHUNK) // max(1, logits.shape[-1]))
    return (slice(first, first + num_rows) for first in range(0, len(logits), num_rows))


def _label_weights(labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp32 `[N]`: every label's weight, 0 where it does not count; and bool `[N]`: where it does."""
    valid = labels != IGNORE_INDEX
    return (valid.float() if weights is None else weights.float().where(valid, 0.0)), valid


def _rows_with_gradient_(logits: Tensor, labels: Tensor, factors: Tensor, valid: Tensor, z_loss: float) -> Tensor:
    """`cross_entropy_with_gradient_` of a few rows, for `_label_weights`."""
    scores = logits.float()  # itself where it is fp32: then all happens in place
    index = labels.where(valid, 0)[:, None]
    label_scores = scores.gather(1, index)[:, 0]
    largest = scores.amax(dim=-1)
    sums = scores.sub_(largest[:, None]).exp_().sum(dim=-1)
    log_sums = sums.log()
    losses = (largest - label_scores) + log_sums  # in this order: `largest` may be far larger than the loss
    gain = factors / sums
    if z_loss != 0:
        logsumexp = largest + log_sums
        losses += z_loss * logsumexp.square()
        gain *= 1 + 2 * z_loss * logsumexp
    scores.mul_(gain[:, None]).scatter_add_(1, index, -factors[:, None])
    if scores is not logits:
        logits.copy_(scores)
    return losses.where(valid, 0.0) * factors


def fused_cross_entropy_with_gradient_(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> Tensor:
    """`cross_entropy_with_gradient_` in one launch: two reads of the logits and one write, and no temporary at all.

    Rows of `logits` must be contiguous (any distance apart). A label outside the vocabulary gives NaN. Raises
    `KernelError` where Triton cannot take these tensors (`support.unsupported(logits, labels, weights)`).
    """
    return _cross_entropy_with_gradient_(logits, labels, weights, z_loss)


@torch.no_grad()
def vocabulary_statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a rank knows of every token's loss, of logits `[N, V]` that are the vocabulary's from `first` on; fp32 `[N]` each.

    The largest logit; the sum of `exp(logit - largest)`; and the label's logit, 0 where the label is not among these.
    `labels` are integers `[N]` in the whole vocabulary. Where no logit is above -inf, or V is 0, the largest is -inf and
    the sum 0. With `m` the largest of all ranks, `lse = m + log(sum over ranks of sum * exp(largest - m))`
    (Shoeybi et al., 2019, arXiv:1909.08053, section 3).
    """
    largest = torch.full(labels.shape, -torch.inf, device=logits.device)
    sums, label_logits = torch.zeros_like(largest), torch.zeros_like(largest)
    if logits.shape[-1] == 0:
        return largest, sums, label_logits
    local, mine = _local_labels(labels, first, logits.shape[-1])
    for some in _chunks(logits):
        scores = logits[some].float()
        torch.amax(scores, dim=-1, out=largest[some])
        origin = largest[some].masked_fill(largest[some] == -torch.inf, 0.0)
        sums[some] = (scores - origin[:, None]).exp_().sum(dim=-1)
        label_logits[some] = scores.gather(-1, local[some, None])[:, 0].where(mine[some], 0.0)
    return largest, sums, label_logits


@torch.no_grad()
def vocabulary_gradient_(
    logits: Tensor, labels: Tensor, first: int, logsumexp: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> None:
    """OVERWRITES this rank's `logits` `[N, V]` with the gradient of the sum of weighted losses, in their dtype.

    `logsumexp` (fp32 `[N]`) is that over the whole vocabulary; `labels`, `first` as in `vocabulary_statistics`, `weights`
    float `[N]` or None for 1 each. A gradient of the sum other than 1 belongs into the weights.
    """
    if logits.shape[-1] == 0:
        return
    factors, _ = _label_weights(labels, weights)
    gain = factors if z_loss == 0 else factors * (1 + 2 * z_loss * logsumexp)
    local, mine = _local_labels(labels, first, logits.shape[-1])
    minus = -factors.where(mine, 0.0)
    for some in _chunks(logits):
        scores = logits[some].float()  # itself where it is fp32: then all happens in place
        scores.sub_(logsumexp[some, None]).exp_().mul_(gain[some, None]).scatter_add_(
            1, local[some, None], minus[some, None]
        )
        if logits.dtype != torch.float32:
            logits[some] = scores


def _local_labels(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """The labels' columns here (0 where elsewhere), and where they are here."""
    local = labels - first
    mine = (local >= 0) & (local < width)
    return local.where(mine, 0), mine


def fused_vocabulary_statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """`vocabulary_statistics` in one read of the logits."""
    largest, sums, label_logits = _vocabulary_statistics(logits, labels, first)
    return largest, sums, label_logits


def fused_vocabulary_gradient_(
    logits: Tensor, labels: Tensor, first: int, logsumexp: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> None:
    """`vocabulary_gradient_` in one read and one write of the logits; their rows must be contiguous."""
    _vocabulary_gradient_(logits, labels, first, logsumexp, weights, z_loss)


@triton.jit
def _taken_in(largest: tl.tensor, total: tl.tensor, scores: tl.tensor) -> tl.tensor:
    """Every lane's largest number and sum of exponentials relative to it, with one more number each."""
    below = largest - scores
    share = tl.where(scores == float("-inf"), 0.0, tl.exp(-tl.abs(below)))  # -inf under -inf: 0, not NaN
    total = tl.where(below < 0, total * share + 1.0, total + share)
    return tl.maximum(largest, scores, propagate_nan=tl.PropagateNan.ALL), total


@triton.jit
def _row_statistics(row_start: tl.tensor, width: tl.tensor, COMPUTE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """A row's largest number and the sum of exponentials relative to it, in one pass (Milakov and Gimelshein, 2018,
    arXiv:1805.02867), NaN where one of them is. Every lane keeps its own two numbers and they meet once, at the end: no
    reduction over threads in the loop, and one exponential for each number. Whole blocks go without a mask, which would
    have them loaded number by number wherever the width is no multiple of 16 bytes."""
    largest = tl.full([BLOCK], float("-inf"), COMPUTE)
    total = tl.zeros([BLOCK], COMPUTE)
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        scores = tl.load(row_start + start + tl.arange(0, BLOCK)).to(COMPUTE)
        largest, total = _taken_in(largest, total, scores)
    columns = whole + tl.arange(0, BLOCK)
    scores = tl.load(row_start + columns, mask=columns < width, other=float("-inf")).to(COMPUTE)
    largest, total = _taken_in(largest, total, scores)
    num_nan = tl.sum((largest != largest).to(tl.int32), axis=0)
    highest = tl.max(largest, axis=0)
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(total * tl.exp(largest - origin), axis=0)
    return tl.where(num_nan > 0, float("nan"), highest), total


@triton.jit
def _gradient_of(
    scores: tl.tensor, columns: tl.tensor, origin: tl.tensor, gain: tl.tensor, factor: tl.tensor, local: tl.tensor
) -> tl.tensor:
    """`exp(score - origin) * gain`, less `factor` at the label's column `local`."""
    return tl.exp(scores - origin) * gain - tl.where(columns == local, factor, 0.0)


@triton.jit
def _row_gradient(
    row_start: tl.tensor,
    out_start: tl.tensor,
    origin: tl.tensor,
    gain: tl.tensor,
    factor: tl.tensor,
    local: tl.tensor,
    width: tl.tensor,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes a row's `_gradient_of`, whole blocks without a mask."""
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        gradient = _gradient_of(tl.load(row_start + columns).to(COMPUTE), columns, origin, gain, factor, local)
        tl.store(out_start + columns, rounded(gradient, out_start.dtype.element_ty))
    columns = whole + tl.arange(0, BLOCK)
    inside = columns < width
    scores = tl.load(row_start + columns, mask=inside, other=0.0).to(COMPUTE)
    gradient = _gradient_of(scores, columns, origin, gain, factor, local)
    tl.store(out_start + columns, rounded(gradient, out_start.dtype.element_ty), mask=inside)


@triton.jit
def _statistics_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    largest: tl.tensor,
    sums: tl.tensor,
    label_logits: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: what `vocabulary_statistics` says of it."""
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * stride
    local = tl.load(labels + row).to(tl.int64) - first
    label_logit = tl.load(row_start + local, mask=(local >= 0) & (local < width), other=0.0).to(COMPUTE)
    highest, total = _row_statistics(row_start, width, COMPUTE, BLOCK)
    tl.store(largest + row, highest)
    tl.store(sums + row, total)
    tl.store(label_logits + row, label_logit)


@triton.jit
def _gradient_kernel(
    logits: tl.tensor,
    out: tl.tensor,
    labels: tl.tensor,
    weights: tl.tensor,
    g: tl.tensor,
    origins: tl.tensor,
    sums: tl.tensor,
    stride: tl.tensor,
    out_stride: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    z_loss: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    IGNORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row's gradient. lse is `origins + log(sums)`, or without sums `origins`; `out` may be `logits`."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    factor = tl.where(label == IGNORE, 0.0, 1.0).to(COMPUTE)
    if HAS_WEIGHTS:
        factor = tl.where(label == IGNORE, 0.0, tl.load(weights + row).to(COMPUTE))
    if HAS_G:
        factor *= tl.load(g + row).to(COMPUTE)
    origin = tl.load(origins + row).to(COMPUTE)
    gain, logsumexp = factor, origin
    if HAS_SUMS:
        total = tl.load(sums + row).to(COMPUTE)
        gain, logsumexp = factor / total, origin + tl.log(total)
    if z_loss != 0:
        gain *= 1.0 + 2.0 * z_loss * logsumexp
    _row_gradient(
        logits + row * stride, out + row * out_stride, origin, gain, factor, label - first, width, COMPUTE, BLOCK
    )


@triton.jit
def _with_gradient_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    weights: tl.tensor,
    losses: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    z_loss: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IGNORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: its loss, then its gradient over its logits."""
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * stride
    label = tl.load(labels + row).to(tl.int64)
    factor = tl.where(label == IGNORE, 0.0, 1.0).to(COMPUTE)
    if HAS_WEIGHTS:
        factor = tl.where(label == IGNORE, 0.0, tl.load(weights + row).to(COMPUTE))
    # Read before anything is written: the reductions below keep all threads in step.
    label_logit = tl.load(row_start + label, mask=(label >= 0) & (label < width), other=float("nan")).to(COMPUTE)
    largest, total = _row_statistics(row_start, width, COMPUTE, BLOCK)
    loss = (largest - label_logit) + tl.log(total)  # in this order: `largest` may be far larger than the loss
    gain = factor / total
    if z_loss != 0:
        logsumexp = largest + tl.log(total)
        loss += z_loss * logsumexp * logsumexp
        gain *= 1.0 + 2.0 * z_loss * logsumexp
    tl.store(losses + row, tl.where(label == IGNORE, 0.0, loss * factor))
    _row_gradient(row_start, row_start, largest, gain, factor, label, width, COMPUTE, BLOCK)


def _blocks(width: int) -> dict[str, int]:
    block = min(next_power_of_2(max(width, 1)), 4096)
    return {"BLOCK": block, "num_warps": num_warps(block)}


def _run_statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    largest, sums, label_logits = _three(logits)
    launch(
        _statistics_kernel,
        (logits.shape[0],),
        *(logits, labels.contiguous(), largest, sums, label_logits, logits.stride(0), logits.shape[1], first),
        COMPUTE=compute_type(logits),
        **_blocks(logits.shape[1]),
    )
    return largest, sums, label_logits


def _run_gradient(
    logits: Tensor,
    out: Tensor,
    labels: Tensor,
    first: int,
    origins: Tensor,
    sums: Tensor | None,
    weights: Tensor | None,
    g: Tensor | None,
    z_loss: float,
) -> None:
    launch(
        _gradient_kernel,
        (logits.shape[0],),
        *(logits, out, labels.contiguous(), labels if weights is None else weights.contiguous()),
        *(labels if g is None else g.contiguous(), origins.contiguous(), origins if sums is None else sums),
        *(logits.stride(0), out.stride(0), logits.shape[1], first),
        z_loss=z_loss,
        HAS_WEIGHTS=weights is not None,
        HAS_G=g is not None,
        HAS_SUMS=sums is not None,
        IGNORE=IGNORE_INDEX,
        COMPUTE=compute_type(logits),
        **_blocks(logits.shape[1]),
    )


def _three(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three numbers a row."""
    a, b, c = (logits.new_empty(logits.shape[0], dtype=compute_dtype(logits)) for _ in range(3))
    return a, b, c


def _check_rows(logits: Tensor) -> None:
    assert logits.dim() == 2 and (logits.stride(1) == 1 or logits.shape[1] <= 1), (logits.shape, logits.stride())


@library.custom_op("megatrain::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor | None, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Every row's weighted loss, largest logit and sum of exponentials."""
    require(logits, labels, weights)
    logits = as_rows(logits)
    largest, sums, label_logits = _run_statistics(logits, labels, 0)
    losses = (largest - label_logits) + sums.log()
    if z_loss != 0:
        losses += z_loss * (largest + sums.log()).square()
    valid = labels != IGNORE_INDEX
    losses.masked_fill_(valid & ((labels < 0) | (labels >= logits.shape[1])), torch.nan)
    if weights is not None:
        losses *= weights
    return losses.where(valid, 0.0), largest, sums


@_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, weights: Tensor | None, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    return _three(logits)


@library.custom_op("megatrain::cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    g: Tensor,
    logits: Tensor,
    labels: Tensor,
    largest: Tensor,
    sums: Tensor,
    weights: Tensor | None,
    z_loss: float,
) -> Tensor:
    """`d_logits`, for gradients `g` `[N]` of the losses."""
    rows, out = as_rows(logits), logits.new_empty(logits.shape)
    _run_gradient(rows, out, labels, 0, largest, sums, weights, g, z_loss)
    return out


@_cross_entropy_backward.register_fake
def _(
    g: Tensor,
    logits: Tensor,
    labels: Tensor,
    largest: Tensor,
    sums: Tensor,
    weights: Tensor | None,
    z_loss: float,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, weights, ctx.z_loss = inputs
    _, largest, sums = output
    ctx.save_for_backward(logits, labels, largest, sums, weights)


def _gradient(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _cross_entropy_backward(g, *ctx.saved_tensors, ctx.z_loss), None, None, None


_cross_entropy.register_autograd(_gradient, setup_context=_save)


@library.custom_op("megatrain::cross_entropy_with_gradient_", mutates_args=("logits",))
def _cross_entropy_with_gradient_(logits: Tensor, labels: Tensor, weights: Tensor | None, z_loss: float) -> Tensor:
    require(logits, labels, weights)
    _check_rows(logits)
    losses = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))
    launch(
        _with_gradient_kernel,
        (logits.shape[0],),
        *(logits, labels.contiguous(), labels if weights is None else weights.contiguous(), losses),
        *(logits.stride(0), logits.shape[1]),
        z_loss=z_loss,
        HAS_WEIGHTS=weights is not None,
        IGNORE=IGNORE_INDEX,
        COMPUTE=compute_type(logits),
        **_blocks(logits.shape[1]),
    )
    return losses


@_cross_entropy_with_gradient_.register_fake
def _(logits: Tensor, labels: Tensor, weights: Tensor | None, z_loss: float) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))


@library.custom_op("megatrain::vocabulary_statistics", mutates_args=())
def _vocabulary_statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    require(logits, labels)
    return _run_statistics(as_rows(logits), labels, first)


@_vocabulary_statistics.register_fake
def _(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    return _three(logits)


@library.custom_op("megatrain::vocabulary_gradient_", mutates_args=("logits",))
def _vocabulary_gradient_(
    logits: Tensor, labels: Tensor, first: int, logsumexp: Tensor, weights: Tensor | None, z_loss: float
) -> None:
    require(logits, labels, logsumexp, weights)
    _check_rows(logits)
    _run_gradient(logits, logits, labels, first, logsumexp, None, weights, None, z_loss)


@_vocabulary_gradient_.register_fake
def _(logits: Tensor, labels: Tensor, first: int, logsumexp: Tensor, weights: Tensor | None, z_loss: float) -> None:
    return None

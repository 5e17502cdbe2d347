"""Cross-entropy of next-token prediction, always summed: the training step divides by the tokens of all ranks.

There are two forms: the summed loss, differentiated by autograd; and the losses with their gradient written over the
logits, plain and fused. vocabulary_cross_entropy.py builds on this file and shards the vocabulary over ranks.

Shapes: N tokens, V vocabulary; `logits` `[N, V]`, `labels` `[N]`, `weights` `[N]`.

**The loss.** A token with logits `s` `[V]`, label `y` and weight `w` has the loss

    loss = w (lse - s[y]),  lse = log(sum over j of exp(s[j])).

The derivative of `lse` with respect to `s[j]` is `p[j] = exp(s[j] - lse)`, the softmax. So the gradient is

    d_s[j] = w (p[j] - onehot(y)[j]).

**Without overflow.** In fp32 `exp(s[j])` overflows if `s[j]` is 89 or more. Relative to the row's largest logit `m`, it
cannot:

    total = sum over j of exp(s[j] - m),
    loss = w ((m - s[y]) + log(total)),
    p[j] = exp(s[j] - m) / total.

The order in `loss` matters: `m` and `s[y]` may be far larger than their difference, so they are subtracted first.

**In one pass: online softmax** (Milakov and Gimelshein, 2018, arXiv:1805.02867). Computing `m` and then `total` would
read the row twice. Instead keep, after `k` logits, the maximum so far, `m_k`, and
`t_k = sum over j <= k of exp(s[j] - m_k)`. The next logit `x` may raise the maximum, and then `t_k` is rescaled:

    m_{k+1} = max(m_k, x),
    t_{k+1} = t_k exp(m_k - m_{k+1}) + exp(x - m_{k+1}).

One of these two exponentials is always `exp(0) = 1` and the other `exp(-|m_k - x|)`, so a logit costs one exponential.
Two such pairs, of different parts of a row, merge in the same way:

    m = max(m_a, m_b),  t = t_a exp(m_a - m) + t_b exp(m_b - m).

Each lane of a kernel keeps a pair of its own, and the lanes merge at the end of the row. Ranks that each hold a part of
the vocabulary merge in the same way. A logit of -inf adds nothing, and NaN or +inf makes the loss NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, library
from torch.nn import functional as F

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.support import (
    compute_dtype,
    compute_type,
    jit,
    launch,
    next_power_of_2,
    num_warps,
    require,
    rounded,
    tl,
)

_CPU_CHUNK = 2**18
"""Logits that the references handle at once: 1 MiB in fp32, so that all passes but the first find them in the cache."""
_CUDA_CHUNK = 2**27
"""The same on a GPU: 512 MiB in fp32, because a temporary of that size costs less than many launches."""


def cross_entropy_sum(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum over the valid labels of `weight * -log softmax(logits)[label]`, in nats, as an fp32 scalar.

    `logits` are `[..., V]` in any dtype (computed in fp32), `labels` integers `[...]`, `weights` float `[...]` or None
    for 1 each. Labels equal to `IGNORE_INDEX` add nothing; if no label is valid the sum is 0.

    Gradient, with `g` that of the sum and `p = softmax(logits)`:
    `d_logits = g * weight * (p - onehot(label))` at valid labels, 0 elsewhere.
    """
    flat_logits, flat_labels = logits.flatten(0, -2).float(), labels.flatten()
    if weights is None:
        return F.cross_entropy(flat_logits, flat_labels, ignore_index=IGNORE_INDEX, reduction="sum")
    losses = F.cross_entropy(flat_logits, flat_labels, ignore_index=IGNORE_INDEX, reduction="none")
    return (losses * weights.flatten().float()).sum()


def label_gap_sum(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum over the valid labels of `weight * (logit of the label - mean of its row's logits)`, fp32.

    Arguments as for `cross_entropy_sum`. Times `s`, it is what label smoothing by `s` adds to that: with the label's
    probability `1 - s` and `s / V` more for each of V tokens, the loss is `logsumexp - (1 - s) z_label - s mean(z)`.
    """
    factors, valid = label_weights(labels.flatten(), None if weights is None else weights.flatten())
    rows = logits.flatten(0, -2)
    of_label = rows.gather(-1, labels.flatten().where(valid, 0)[:, None])[:, 0].float()
    return ((of_label - rows.float().mean(-1)) * factors).sum()


def linear_label_gap_sum(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return `label_gap_sum(x weight^T, labels, weights)` without the logits: the mean of logits is linear in `x`."""
    factors, valid = label_weights(labels.flatten(), None if weights is None else weights.flatten())
    target = F.embedding(labels.flatten().where(valid, 0), weight).float() - weight.float().mean(0)
    return ((x.flatten(0, -2).float() * target).sum(-1) * factors).sum()


@torch.no_grad()
def cross_entropy_with_gradient_(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return each token's weighted loss, fp32 `[N]`, and OVERWRITE `logits` with the gradient of the sum of losses.

    `logits` are `[N, V]`, `labels` integers `[N]`, `weights` float `[N]` or None for 1 each. A label of `IGNORE_INDEX`
    has loss and gradient 0. Computed in fp32, a few rows at a time, so there is never a second array of the logits'
    size; the gradient is stored in the logits' dtype. Autograd does not track this function.
    """
    losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    factors, valid = label_weights(labels, weights)
    for rows in row_chunks(logits):
        losses[rows] = _rows_with_gradient_(logits[rows], labels[rows], factors[rows], valid[rows])
    return losses


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Yield slices of rows to handle at once."""
    num_rows = max(1, (_CUDA_CHUNK if logits.is_cuda else _CPU_CHUNK) // max(1, logits.shape[-1]))
    return (slice(first, first + num_rows) for first in range(0, len(logits), num_rows))


def label_weights(labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each label's weight, fp32 `[N]`, 0 for ignored labels, and a bool mask `[N]` of the valid labels."""
    valid = labels != IGNORE_INDEX
    return (valid.float() if weights is None else weights.float().where(valid, 0.0)), valid


def _rows_with_gradient_(logits: Tensor, labels: Tensor, factors: Tensor, valid: Tensor) -> Tensor:
    """Compute `cross_entropy_with_gradient_` for a few rows; `factors` and `valid` as `label_weights` returns them."""
    scores = logits.float()  # fp32 logits are not copied, so all of this is in place
    index = labels.where(valid, 0)[:, None]
    label_scores = scores.gather(1, index)[:, 0]
    largest = scores.amax(dim=-1)
    sums = scores.sub_(largest[:, None]).exp_().sum(dim=-1)
    losses = (largest - label_scores) + sums.log()
    scores.mul_((factors / sums)[:, None]).scatter_add_(1, index, -factors[:, None])
    if scores is not logits:
        logits.copy_(scores)
    return losses.where(valid, 0.0) * factors


def fused_cross_entropy_with_gradient_(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute `cross_entropy_with_gradient_` in one launch: two reads of the logits, one write, no temporary.

    Each row of `logits` must be contiguous. Computed in fp32 (fp64 for fp64). A label outside the vocabulary gives NaN.

    Raises:
        KernelError: Triton cannot take these tensors (`support.unsupported(logits, labels, weights)`).
    """
    losses: Tensor = _cross_entropy_with_gradient_(logits, labels, weights)
    return losses


@jit
def online_softmax_update(largest: tl.tensor, total: tl.tensor, scores: tl.tensor) -> tl.tensor:
    """Return each lane's pair (largest, total) after one more logit, `scores`."""
    below = largest - scores
    share = tl.where(scores == float("-inf"), 0.0, tl.exp(-tl.abs(below)))  # -inf after -inf: 0, not NaN
    total = tl.where(below < 0, total * share + 1.0, total + share)
    return tl.maximum(largest, scores, propagate_nan=tl.PropagateNan.ALL), total


@jit
def row_statistics(row_start: tl.tensor, width: tl.tensor, COMPUTE: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Return a row's largest logit and its sum of exponentials relative to it, in one pass; NaN if a logit is NaN.

    Each of BLOCK lanes keeps its own pair, and they merge after the loop, so the loop has no reduction over
    threads. All blocks except the last are loaded without a mask. A masked load would read one element at a time if a
    row's length is not a multiple of 16 bytes.
    """
    largest = tl.full([BLOCK], float("-inf"), COMPUTE)
    total = tl.zeros([BLOCK], COMPUTE)
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        scores = tl.load(row_start + start + tl.arange(0, BLOCK)).to(COMPUTE)
        largest, total = online_softmax_update(largest, total, scores)
    columns = whole + tl.arange(0, BLOCK)
    scores = tl.load(row_start + columns, mask=columns < width, other=float("-inf")).to(COMPUTE)
    largest, total = online_softmax_update(largest, total, scores)
    num_nan = tl.sum((largest != largest).to(tl.int32), axis=0)
    highest = tl.max(largest, axis=0)
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(total * tl.exp(largest - origin), axis=0)
    return tl.where(num_nan > 0, float("nan"), highest), total


@jit
def _gradient_of(
    scores: tl.tensor, columns: tl.tensor, origin: tl.tensor, gain: tl.tensor, factor: tl.tensor, local: tl.tensor
) -> tl.tensor:
    """Return `exp(score - origin) * gain`, minus `factor` at the label's column `local`."""
    return tl.exp(scores - origin) * gain - tl.where(columns == local, factor, 0.0)


@jit
def row_gradient_(
    row_start: tl.tensor,
    origin: tl.tensor,
    gain: tl.tensor,
    factor: tl.tensor,
    local: tl.tensor,
    width: tl.tensor,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Overwrite a row with its `_gradient_of`. All blocks except the last need no mask."""
    whole = width // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        gradient = _gradient_of(tl.load(row_start + columns).to(COMPUTE), columns, origin, gain, factor, local)
        tl.store(row_start + columns, rounded(gradient, row_start.dtype.element_ty))
    columns = whole + tl.arange(0, BLOCK)
    inside = columns < width
    scores = tl.load(row_start + columns, mask=inside, other=0.0).to(COMPUTE)
    gradient = _gradient_of(scores, columns, origin, gain, factor, local)
    tl.store(row_start + columns, rounded(gradient, row_start.dtype.element_ty), mask=inside)


@jit
def label_factor(
    label: tl.tensor,
    weights: tl.tensor,
    row: tl.tensor,
    HAS_WEIGHTS: tl.constexpr,
    IGNORE: tl.constexpr,
    COMPUTE: tl.constexpr,
) -> tl.tensor:
    """Return a label's weight, 0 for an ignored label."""
    factor = tl.where(label == IGNORE, 0.0, 1.0).to(COMPUTE)
    if HAS_WEIGHTS:
        factor = tl.where(label == IGNORE, 0.0, tl.load(weights + row).to(COMPUTE))
    return factor


@jit
def _with_gradient_kernel(
    logits: tl.tensor,
    labels: tl.tensor,
    weights: tl.tensor,
    losses: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    HAS_WEIGHTS: tl.constexpr,
    IGNORE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store one row's loss, then overwrite its logits with their gradient."""
    row = tl.program_id(0).to(tl.int64)
    row_start = logits + row * stride
    label = tl.load(labels + row).to(tl.int64)
    factor = label_factor(label, weights, row, HAS_WEIGHTS, IGNORE, COMPUTE)
    # Read this before anything is overwritten: the reductions below synchronise all threads.
    label_logit = tl.load(row_start + label, mask=(label >= 0) & (label < width), other=float("nan")).to(COMPUTE)
    largest, total = row_statistics(row_start, width, COMPUTE, BLOCK)
    loss = (largest - label_logit) + tl.log(total)
    tl.store(losses + row, tl.where(label == IGNORE, 0.0, loss * factor))
    row_gradient_(row_start, largest, factor / total, factor, label, width, COMPUTE, BLOCK)


def row_blocks(width: int) -> dict[str, int]:
    """Return the block size and number of warps of a kernel with one program per row."""
    block = min(next_power_of_2(max(width, 1)), 4096)
    return {"BLOCK": block, "num_warps": num_warps(block)}


def check_rows(logits: Tensor) -> None:
    """Assert that `logits` is `[N, V]` with contiguous rows, which may be any distance apart."""
    assert logits.dim() == 2 and (logits.stride(1) == 1 or logits.shape[1] <= 1), (logits.shape, logits.stride())


@library.custom_op("megatrain::cross_entropy_with_gradient_", mutates_args=("logits",))
def _cross_entropy_with_gradient_(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    require(logits, labels, weights)
    check_rows(logits)
    losses = logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))
    launch(
        _with_gradient_kernel,
        (logits.shape[0],),
        *(logits, labels.contiguous(), labels if weights is None else weights.contiguous(), losses),
        *(logits.stride(0), logits.shape[1]),
        HAS_WEIGHTS=weights is not None,
        IGNORE=IGNORE_INDEX,
        COMPUTE=compute_type(logits),
        **row_blocks(logits.shape[1]),
    )
    return losses


@_cross_entropy_with_gradient_.register_fake
def _(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=compute_dtype(logits))

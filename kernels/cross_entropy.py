"""Cross-entropy of next-token prediction: the plain reference. Summing, not averaging: the step divides, over all ranks."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megatrain.data.batch import IGNORE_INDEX


def cross_entropy_sum(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over the valid labels of `weight * -log softmax(logits)[label]`, in nats; an fp32 scalar.

    `logits` are `[..., V]` in any dtype (computed in fp32), `labels` integers `[...]`, `weights` float `[...]` or None
    for 1 each. Labels equal to `IGNORE_INDEX` add nothing; with none valid the sum is 0.

    Gradient, with `g` that of the sum and `p = softmax(logits)`: `d_logits = g * weight * (p - onehot(label))` at valid
    labels, 0 elsewhere.
    """
    flat_logits, flat_labels = logits.flatten(0, -2).float(), labels.flatten()
    if weights is None:
        return F.cross_entropy(flat_logits, flat_labels, ignore_index=IGNORE_INDEX, reduction="sum")
    losses = F.cross_entropy(flat_logits, flat_labels, ignore_index=IGNORE_INDEX, reduction="none")
    return (losses * weights.flatten().float()).sum()

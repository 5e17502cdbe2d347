"""Cross-entropy over a vocabulary that is cut over ranks, without the ranks: statistics merged here, gradients
joined."""

from itertools import pairwise

import pytest
import torch
from support.fused_checks import DEVICE, DTYPES, cross_entropy_case, error, exact_losses_and_gradient, randn

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels import vocabulary_cross_entropy as module
from megatrain.kernels.vocabulary_cross_entropy import (
    fused_vocabulary_gradient_,
    fused_vocabulary_statistics,
    vocabulary_gradient_,
    vocabulary_statistics,
)

STATISTICS = [vocabulary_statistics, fused_vocabulary_statistics]
GRADIENT = [vocabulary_gradient_, fused_vocabulary_gradient_]


@pytest.mark.parametrize("statistics, gradient_", zip(STATISTICS, GRADIENT, strict=True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("cuts", [[0, 40, 40, 100], [0, 4500, 5000], [0, 7]])
def test_a_vocabulary_cut_over_ranks(statistics, gradient_, cuts, weighted, dtype):
    """One rank may hold nothing of the vocabulary, or only tokens that cannot come."""
    logits, labels, weights = cross_entropy_case(5, cuts[-1], weighted)
    logits[:, : cuts[1] // 2] = -torch.inf
    labels[labels < cuts[1] // 2] += cuts[1] // 2
    labels[1] = IGNORE_INDEX
    logits, labels = logits.to(dtype).to(DEVICE), labels.to(DEVICE)
    weights = weights if weights is None else weights.to(DEVICE)
    losses, gradient = exact_losses_and_gradient(logits, labels, weights)
    shards = [logits[:, a:b].clone() for a, b in pairwise(cuts)]
    parts = [statistics(shard, labels, first) for shard, first in zip(shards, cuts, strict=False)]
    assert all(t.dtype == torch.float32 for part in parts for t in part)
    largest = torch.stack([m for m, _, _ in parts]).amax(0)
    lse = largest + sum(s * (m - largest).exp() for m, s, _ in parts).log()
    factors = (labels != IGNORE_INDEX).float() * (1.0 if weights is None else weights)
    assert error((lse - sum(t for _, _, t in parts)) * factors, losses) < 1e-5
    for shard, first in zip(shards, cuts, strict=False):
        assert gradient_(shard, labels, first, lse, weights) is None
    limit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert error(torch.cat(shards, 1), gradient) < limit


@pytest.mark.parametrize("statistics", STATISTICS)
def test_the_statistics_propagate_bad_numbers(statistics):
    logits = randn(4, 6000).float().to(DEVICE)
    logits[0, 5000], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    largest, sums, _ = statistics(logits, torch.zeros(4, dtype=torch.int64, device=DEVICE), 0)
    assert largest[0].isnan() and sums[0].isnan()
    assert largest[1] == torch.inf and sums[1].isnan()
    assert largest[2] == -torch.inf and sums[2] == 0
    assert largest[3].isfinite() and sums[3].isfinite()


def test_as_operators():
    """torch.library checks that they trace, and change what they say they change."""
    logits, labels, weights = cross_entropy_case(5, 40, weighted=True)
    logits, labels, weights = logits.float().to(DEVICE), labels.to(DEVICE), weights.to(DEVICE)
    lse = logits.logsumexp(-1)
    torch.library.opcheck(module._vocabulary_statistics._opoverload, (logits, labels, 0))
    torch.library.opcheck(module._vocabulary_gradient_._opoverload, (logits.clone(), labels, 0, lse, weights))

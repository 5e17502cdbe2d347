"""Cross-entropy: summed, with its gradient in place, and in the two halves that a cut vocabulary needs."""

from itertools import pairwise

import pytest
import torch
from support.fused_checks import DEVICE, DTYPES, check_accuracy, check_operator, error, randn

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels import cross_entropy as module
from megatrain.kernels.cross_entropy import (
    cross_entropy_sum,
    cross_entropy_with_gradient_,
    fused_cross_entropy_sum,
    fused_cross_entropy_with_gradient_,
    fused_vocabulary_gradient_,
    fused_vocabulary_statistics,
    vocabulary_gradient_,
    vocabulary_statistics,
)

IN_PLACE = [cross_entropy_with_gradient_, fused_cross_entropy_with_gradient_]
STATISTICS = [vocabulary_statistics, fused_vocabulary_statistics]
GRADIENT = [vocabulary_gradient_, fused_vocabulary_gradient_]
SIZES = [(5, 100), (1, 1), (4, 1), (1, 300), (3, 5000), (2, 50257), (1, 128256)]


def token_losses(logits, labels, weights, z_loss):
    """float64 `[N]`, by the formula."""
    lse = logits.logsumexp(-1)
    picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    losses = lse - picked + z_loss * lse.square()
    return (losses * (1 if weights is None else weights)).where(labels != IGNORE_INDEX, 0.0)


def formula(logits, labels, weights, z_loss):
    return token_losses(logits, labels, weights, z_loss).sum()


def case(num_tokens, vocab, weighted, scale=3.0):
    """float64 logits, labels (the second one ignored), float weights or None."""
    generator = torch.Generator().manual_seed(vocab)
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    labels[0] = vocab - 1
    if num_tokens > 1:
        labels[1] = IGNORE_INDEX
    weights = torch.rand(num_tokens, generator=generator) + 0.5 if weighted else None
    return randn(num_tokens, vocab, scale=scale), labels, weights


def exact_losses_and_gradient(logits, labels, weights, z_loss):
    logits = logits.detach().cpu().double().requires_grad_()
    losses = token_losses(logits, labels.cpu(), None if weights is None else weights.cpu().double(), z_loss)
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted, z_loss", [(False, 0.0), (True, 1e-2)])
@pytest.mark.parametrize("size", SIZES)
def test_the_sum_and_its_gradient(size, weighted, z_loss, dtype):
    logits, labels, weights = case(*size, weighted)
    inputs = [logits.requires_grad_(), labels, weights, z_loss]
    check_accuracy(fused_cross_entropy_sum, cross_entropy_sum, formula, inputs, dtype)


@pytest.mark.parametrize("weighted, z_loss", [(False, 1e-2), (True, 0.0), (True, 1e-2)])
def test_the_reference_has_its_documented_gradient(weighted, z_loss):
    logits, labels, weights = case(5, 11, weighted)
    logits = logits.float().requires_grad_()
    total = cross_entropy_sum(logits[None], labels[None], None if weights is None else weights[None], z_loss)
    losses, gradient = exact_losses_and_gradient(logits, labels, weights, z_loss)
    torch.testing.assert_close(total, losses.sum().float())
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], gradient.float())


@pytest.mark.parametrize("function", IN_PLACE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted, z_loss", [(False, 0.0), (True, 1e-2)])
@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_takes_the_place_of_the_logits(function, size, weighted, z_loss, dtype):
    logits, labels, weights = case(*size, weighted)
    logits, labels = logits.to(dtype).to(DEVICE), labels.to(DEVICE)
    weights = weights if weights is None else weights.to(DEVICE)
    losses, gradient = exact_losses_and_gradient(logits, labels, weights, z_loss)
    result = function(logits, labels, weights, z_loss)
    assert result.dtype == torch.float32 and logits.dtype == dtype
    assert error(result, losses) < 1e-5
    assert error(logits, gradient) < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    assert not logits[labels == IGNORE_INDEX].any(), "a label that does not count has no gradient"


@pytest.mark.parametrize("function", IN_PLACE)
def test_rows_of_a_larger_array_and_several_chunks(function, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", 100)  # two rows of 40
    monkeypatch.setattr(module, "_CUDA_CHUNK", 100)
    whole = randn(7, 50).float().to(DEVICE)
    before, labels = whole.clone(), torch.arange(7, device=DEVICE)
    losses, gradient = exact_losses_and_gradient(whole[:, 5:45], labels, None, 1e-3)
    assert error(function(whole[:, 5:45], labels, None, 1e-3), losses) < 1e-5
    assert error(whole[:, 5:45], gradient) < 1e-5
    assert torch.equal(whole[:, :5], before[:, :5]) and torch.equal(whole[:, 45:], before[:, 45:])


@pytest.mark.parametrize("function", [cross_entropy_sum, fused_cross_entropy_sum, *IN_PLACE])
def test_logits_of_ten_thousand_neither_overflow_nor_drown_the_loss(function):
    logits = (randn(4, 700) + torch.tensor([1e4, -1e4, 0.0, 1e4])[:, None]).float()
    logits[2, :] *= 1e4
    labels = torch.tensor([0, 1, 2, int(logits[3].argmax())])
    losses, gradient = exact_losses_and_gradient(logits, labels, None, 0.0)
    logits, labels = logits.to(DEVICE).requires_grad_(function not in IN_PLACE), labels.to(DEVICE)
    result = function(logits, labels)
    if function in IN_PLACE:
        assert error(result[[0, 1, 3]], losses[[0, 1, 3]]) < 1e-5
        assert error(logits, gradient) < 1e-5
    assert float(result.sum()) == pytest.approx(float(losses.sum()), rel=1e-5)
    if function not in IN_PLACE:
        assert error(torch.autograd.grad(result, logits)[0], gradient) < 1e-5


@pytest.mark.parametrize("function", [cross_entropy_sum, fused_cross_entropy_sum, *IN_PLACE])
@pytest.mark.parametrize("column", [3, 5900])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_is_never_hidden(function, bad, column):
    """Whether it stands before or after the row's largest number, in the label's column or not."""
    logits = randn(3, 6000).float().to(DEVICE)
    logits[1, column] = bad
    logits.requires_grad_(function not in IN_PLACE)
    result = function(logits, torch.tensor([5, 6, 5], device=DEVICE))
    assert result.sum().isnan()
    if function in IN_PLACE:
        assert result.isnan().tolist() == [False, True, False]
    gradient = logits if function in IN_PLACE else torch.autograd.grad(result, logits)[0]
    assert gradient[1, column].isnan() and gradient[0].isfinite().all() and gradient[2].isfinite().all()


@pytest.mark.parametrize("function", IN_PLACE)
def test_minus_infinity_is_a_token_that_cannot_come(function):
    """Also where a whole block of the row is -inf; a row of nothing else is NaN."""
    logits = randn(2, 9000).float().to(DEVICE)
    logits[0, :5000], logits[1] = -torch.inf, -torch.inf
    losses, gradient = exact_losses_and_gradient(logits[:1], torch.tensor([8000]), None, 0.0)
    result = function(logits, torch.tensor([8000, 3], device=DEVICE))
    assert error(result[:1], losses) < 1e-5 and error(logits[:1], gradient) < 1e-5
    assert result[1].isnan() and logits[1].isnan().any()


def test_a_label_outside_the_vocabulary_is_nan_in_the_fused_forms():
    labels = torch.tensor([4, 3], device=DEVICE)
    logits = torch.zeros(2, 4, device=DEVICE)
    assert fused_cross_entropy_sum(logits, labels).isnan()
    assert fused_cross_entropy_with_gradient_(logits, labels).isnan().tolist() == [True, False]


def test_without_a_label_that_counts_the_sum_and_the_gradient_are_zero():
    logits = randn(2, 3, 9).float().to(DEVICE).requires_grad_()
    total = fused_cross_entropy_sum(logits, torch.full((2, 3), IGNORE_INDEX, device=DEVICE), None, 1e-3)
    assert total.item() == 0.0 and not torch.autograd.grad(total, logits)[0].any()


@pytest.mark.parametrize("statistics, gradient_", zip(STATISTICS, GRADIENT, strict=True))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted, z_loss", [(False, 0.0), (True, 1e-2)])
@pytest.mark.parametrize("cuts", [[0, 40, 40, 100], [0, 4500, 5000], [0, 7]])
def test_a_vocabulary_cut_over_ranks(statistics, gradient_, cuts, weighted, z_loss, dtype):
    """The reductions written out; one rank may hold nothing of the vocabulary, or only tokens that cannot come."""
    logits, labels, weights = case(5, cuts[-1], weighted)
    logits[:, : cuts[1] // 2] = -torch.inf
    labels[labels < cuts[1] // 2] += cuts[1] // 2
    labels[1] = IGNORE_INDEX
    logits, labels = logits.to(dtype).to(DEVICE), labels.to(DEVICE)
    weights = weights if weights is None else weights.to(DEVICE)
    losses, gradient = exact_losses_and_gradient(logits, labels, weights, z_loss)
    shards = [logits[:, a:b].clone() for a, b in pairwise(cuts)]
    parts = [statistics(shard, labels, first) for shard, first in zip(shards, cuts, strict=False)]
    assert all(t.dtype == torch.float32 for part in parts for t in part)
    largest = torch.stack([m for m, _, _ in parts]).amax(0)
    lse = largest + sum(s * (m - largest).exp() for m, s, _ in parts).log()
    factors = (labels != IGNORE_INDEX).float() * (1.0 if weights is None else weights)
    assert error((lse - sum(t for _, _, t in parts) + z_loss * lse.square()) * factors, losses) < 1e-5
    for shard, first in zip(shards, cuts, strict=False):
        assert gradient_(shard, labels, first, lse, weights, z_loss) is None
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


def test_the_reference_in_place_is_that_of_autograd():
    logits, labels, weights = case(6, 500, weighted=True)
    logits = logits.float().requires_grad_()
    total = cross_entropy_sum(logits, labels, weights, 1e-3)
    (gradient,) = torch.autograd.grad(total, logits)
    overwritten = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_with_gradient_(overwritten, labels, weights, 1e-3).sum(), total)
    torch.testing.assert_close(overwritten, gradient)


def test_gradcheck():
    logits, labels, weights = case(3, 7, weighted=True)
    logits, labels, weights = logits.to(DEVICE).requires_grad_(), labels.to(DEVICE), weights.to(DEVICE)
    assert torch.autograd.gradcheck(lambda x: fused_cross_entropy_sum(x, labels, weights, 1e-2), (logits,))


def test_as_an_operator():
    logits, labels, weights = case(5, 40, weighted=True)
    inputs = [logits.requires_grad_(), labels, weights.double(), 1e-3]
    check_operator(fused_cross_entropy_sum, module._cross_entropy._opoverload, inputs)


def test_operators_that_overwrite():
    """torch.library checks that they change what they say, and that they trace; twice the bits are the same."""
    logits, labels, weights = case(5, 40, weighted=True)
    logits, labels, weights = logits.float().to(DEVICE), labels.to(DEVICE), weights.to(DEVICE)
    lse = logits.logsumexp(-1)
    torch.library.opcheck(module._cross_entropy_with_gradient_._opoverload, (logits.clone(), labels, weights, 1e-3))
    torch.library.opcheck(module._vocabulary_statistics._opoverload, (logits, labels, 0))
    torch.library.opcheck(module._vocabulary_gradient_._opoverload, (logits.clone(), labels, 0, lse, weights, 1e-3))
    torch._dynamo.reset()
    results = []
    for _ in range(2):
        mine = logits.clone()
        traced = torch.compile(fused_cross_entropy_with_gradient_, fullgraph=True, backend="aot_eager")
        results.append((traced(mine, labels, weights, 1e-3), mine))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    plain = logits.clone()
    assert torch.equal(fused_cross_entropy_with_gradient_(plain, labels, weights, 1e-3), results[0][0])
    assert torch.equal(plain, results[0][1])

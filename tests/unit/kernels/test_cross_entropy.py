"""Cross-entropy over a whole vocabulary: summed, and with its gradient in place of the logits."""

import pytest
import torch
from support.fused_checks import DEVICE, DTYPES, cross_entropy_case, error, exact_losses_and_gradient, randn

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels import cross_entropy as module
from megatrain.kernels.cross_entropy import (
    cross_entropy_sum,
    cross_entropy_with_gradient_,
    fused_cross_entropy_with_gradient_,
)

IN_PLACE = [cross_entropy_with_gradient_, fused_cross_entropy_with_gradient_]
SIZES = [(5, 100), (1, 1), (4, 1), (1, 300), (3, 5000), (2, 50257), (1, 128256)]


def test_the_reference_has_its_documented_gradient():
    logits, labels, weights = cross_entropy_case(5, 11, weighted=True)
    logits = logits.float().requires_grad_()
    total = cross_entropy_sum(logits[None], labels[None], weights[None])
    losses, gradient = exact_losses_and_gradient(logits, labels, weights)
    torch.testing.assert_close(total, losses.sum().float())
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], gradient.float())


@pytest.mark.parametrize("function", IN_PLACE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_the_gradient_takes_the_place_of_the_logits(function, size, weighted, dtype):
    logits, labels, weights = cross_entropy_case(*size, weighted)
    logits, labels = logits.to(dtype).to(DEVICE), labels.to(DEVICE)
    weights = weights if weights is None else weights.to(DEVICE)
    losses, gradient = exact_losses_and_gradient(logits, labels, weights)
    result = function(logits, labels, weights)
    assert result.dtype == torch.float32 and logits.dtype == dtype
    assert error(result, losses) < 1e-5
    assert error(logits, gradient) < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    assert not logits[labels == IGNORE_INDEX].any(), "an ignored label has no gradient"


def test_the_fused_form_computes_float64_in_float64():
    logits, labels, weights = cross_entropy_case(3, 7, weighted=True)
    losses, gradient = exact_losses_and_gradient(logits, labels, weights)
    logits = logits.to(DEVICE)
    result = fused_cross_entropy_with_gradient_(logits, labels.to(DEVICE), weights.to(DEVICE))
    assert result.dtype == torch.float64
    assert error(result, losses) < 1e-13 and error(logits, gradient) < 1e-13


@pytest.mark.parametrize("function", IN_PLACE)
def test_rows_of_a_larger_array_and_several_chunks(function, monkeypatch):
    monkeypatch.setattr(module, "_CPU_CHUNK", 100)  # two rows of 40
    monkeypatch.setattr(module, "_CUDA_CHUNK", 100)
    whole = randn(7, 50).float().to(DEVICE)
    before, labels = whole.clone(), torch.arange(7, device=DEVICE)
    losses, gradient = exact_losses_and_gradient(whole[:, 5:45], labels)
    assert error(function(whole[:, 5:45], labels), losses) < 1e-5
    assert error(whole[:, 5:45], gradient) < 1e-5
    assert torch.equal(whole[:, :5], before[:, :5]) and torch.equal(whole[:, 45:], before[:, 45:])


@pytest.mark.parametrize("function", [cross_entropy_sum, *IN_PLACE])
def test_logits_of_ten_thousand_neither_overflow_nor_drown_the_loss(function):
    logits = (randn(4, 700) + torch.tensor([1e4, -1e4, 0.0, 1e4])[:, None]).float()
    logits[2, :] *= 1e4
    labels = torch.tensor([0, 1, 2, int(logits[3].argmax())])
    losses, gradient = exact_losses_and_gradient(logits, labels)
    logits, labels = logits.to(DEVICE).requires_grad_(function not in IN_PLACE), labels.to(DEVICE)
    result = function(logits, labels)
    if function in IN_PLACE:
        assert error(result[[0, 1, 3]], losses[[0, 1, 3]]) < 1e-5
        assert error(logits, gradient) < 1e-5
    assert float(result.sum()) == pytest.approx(float(losses.sum()), rel=1e-5)
    if function not in IN_PLACE:
        assert error(torch.autograd.grad(result, logits)[0], gradient) < 1e-5


@pytest.mark.parametrize("function", [cross_entropy_sum, *IN_PLACE])
@pytest.mark.parametrize("column", [3, 5900])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_is_never_hidden(function, bad, column):
    """Before or after the row's largest logit, in the label's column or not."""
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
    """Even where a whole block of the row is -inf; a row of nothing else is NaN."""
    logits = randn(2, 9000).float().to(DEVICE)
    logits[0, :5000], logits[1] = -torch.inf, -torch.inf
    losses, gradient = exact_losses_and_gradient(logits[:1], torch.tensor([8000]))
    result = function(logits, torch.tensor([8000, 3], device=DEVICE))
    assert error(result[:1], losses) < 1e-5 and error(logits[:1], gradient) < 1e-5
    assert result[1].isnan() and logits[1].isnan().any()


def test_a_label_outside_the_vocabulary_is_nan_in_the_fused_form():
    logits = torch.zeros(2, 4, device=DEVICE)
    labels = torch.tensor([4, 3], device=DEVICE)
    assert fused_cross_entropy_with_gradient_(logits, labels).isnan().tolist() == [True, False]


@pytest.mark.parametrize("function", IN_PLACE)
def test_where_every_label_is_ignored_losses_and_gradient_are_zero(function):
    logits = randn(6, 9).float().to(DEVICE)
    losses = function(logits, torch.full((6,), IGNORE_INDEX, device=DEVICE))
    assert not losses.any() and not logits.any()


def test_the_reference_in_place_is_that_of_autograd():
    logits, labels, weights = cross_entropy_case(6, 500, weighted=True)
    logits = logits.float().requires_grad_()
    total = cross_entropy_sum(logits, labels, weights)
    (gradient,) = torch.autograd.grad(total, logits)
    overwritten = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_with_gradient_(overwritten, labels, weights).sum(), total)
    torch.testing.assert_close(overwritten, gradient)


def test_as_an_operator():
    """torch.library accepts it, torch.compile traces it, and two runs are equal bit for bit."""
    logits, labels, weights = cross_entropy_case(5, 40, weighted=True)
    logits, labels, weights = logits.float().to(DEVICE), labels.to(DEVICE), weights.to(DEVICE)
    torch.library.opcheck(module._cross_entropy_with_gradient_._opoverload, (logits.clone(), labels, weights))
    torch._dynamo.reset()
    results = []
    for _ in range(2):
        overwritten = logits.clone()
        traced = torch.compile(fused_cross_entropy_with_gradient_, fullgraph=True, backend="aot_eager")
        results.append((traced(overwritten, labels, weights), overwritten))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    plain = logits.clone()
    assert torch.equal(fused_cross_entropy_with_gradient_(plain, labels, weights), results[0][0])
    assert torch.equal(plain, results[0][1])

"""Log-probabilities of labels, whole and in chunks, against a float64 reference and against the memory of the whole."""

from __future__ import annotations

import pytest
import torch

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.linear_log_probs import chunked_linear_log_probs, linear_log_probs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(rows, width, vocab, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(rows + width + vocab)
    x = torch.randn(rows, width, generator=generator).mul(scale).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).div(width**0.5).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::5] = IGNORE_INDEX
    g = torch.randn(rows, generator=generator).to(DEVICE)
    return x, weight, labels.to(DEVICE), g


def truth(x, weight, labels, g):
    """Log-probabilities and gradients in float64, from the definition."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    valid = labels != IGNORE_INDEX
    found = (x @ weight.T).log_softmax(-1).gather(-1, labels.where(valid, 0)[:, None])[:, 0].where(valid, 0.0)
    return found.detach(), *torch.autograd.grad(found, [x, weight], g.double())


def error(found, true):
    return float((found.detach().double() - true).abs().max() / true.abs().max().clamp(min=1e-300))


@pytest.mark.parametrize(
    ("rows", "width", "vocab", "chunk_rows"),
    [(7, 5, 11, 3), (1, 4, 9, 1), (6, 1, 5, 100), (13, 16, 257, 4), (9, 8, 50257, 4), (8, 8, 1, 4)],
)
@pytest.mark.parametrize("form", ["whole", "chunks", "fused"])
def test_log_probabilities_and_gradients_are_those_of_the_definition(rows, width, vocab, chunk_rows, form):
    x, weight, labels, g = problem(rows, width, vocab)
    if form == "whole":
        found = linear_log_probs(x, weight, labels)
    else:
        found = chunked_linear_log_probs(x, weight, labels, chunk_rows * vocab * 4, fused=form == "fused")
    true, *gradients = truth(x, weight, labels, g)
    assert found.dtype == torch.float32 and error(found, true) < 1e-5
    assert (found[labels == IGNORE_INDEX] == 0).all()
    for mine, theirs in zip(torch.autograd.grad(found, [x, weight], g), gradients, strict=True):
        assert mine.shape == theirs.shape and error(mine, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype):
    x, weight, labels, g = problem(64, 32, 301, dtype)
    found = chunked_linear_log_probs(x, weight, labels, 16 * 301 * 2)
    true, *gradients = truth(x, weight, labels, g)
    limit = 4 * torch.finfo(dtype).eps
    assert found.dtype == torch.float32 and error(found, true) < limit
    for mine, theirs in zip(torch.autograd.grad(found, [x, weight], g), gradients, strict=True):
        assert mine.dtype == dtype and error(mine, theirs) < limit


def test_large_logits_neither_overflow_nor_lose_the_difference():
    x, weight, labels, g = problem(9, 8, 40, scale=1e3)
    found = chunked_linear_log_probs(x, weight, labels, 3 * 40 * 4)
    assert error(found, truth(x, weight, labels, g)[0]) < 1e-5


def test_shapes_are_kept_and_no_rows_are_no_error():
    x, weight, labels, _ = problem(12, 8, 11)
    found = chunked_linear_log_probs(x.view(3, 4, 8), weight, labels.view(3, 4))
    assert found.shape == (3, 4) and torch.equal(found.flatten(), chunked_linear_log_probs(x, weight, labels))
    nothing = chunked_linear_log_probs(x[:0], weight, labels[:0])
    assert torch.equal(torch.autograd.grad(nothing.sum(), weight)[0], torch.zeros_like(weight))


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary():
    kept = []
    x, weight, labels, _ = problem(64, 8, 5000)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        chunked_linear_log_probs(x, weight, labels, 4 * 5000 * 4)
    assert max(t.numel() for t in kept if t is not weight and t.data_ptr() != weight.data_ptr()) <= x.numel()

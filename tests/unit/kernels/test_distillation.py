"""The loss of distillation and its gradients: against kl_div in float64, and the memory of chunks."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.distillation import (
    Teaching,
    chunked_linear_distillation,
    distillation_of_logits,
    linear_distillation,
)

SHAPES = [(7, 5, 11, 3), (1, 4, 9, 1), (6, 1, 5, 100), (13, 16, 257, 4)]
"""Rows, width, vocabulary and rows of a chunk."""


def problem(rows, width, vocab, dtype=torch.float32, **how):
    generator = torch.Generator().manual_seed(rows + width + vocab)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator).mul(scale).to(dtype)

    x, weight = draw(rows, width).requires_grad_(), draw(vocab, width, scale=2 / width**0.5).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[1::5] = IGNORE_INDEX
    weights = torch.rand(rows, generator=generator)
    return x, weight, labels, weights, Teaching(draw(rows, 6), draw(vocab, 6), **how)


def truth(x, weight, labels, weights, teaching):
    """Loss, both parts and gradients in float64, from torch's kl_div."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits, theirs = x @ weight.T, teaching.hidden.double() @ teaching.weight.double().T
    q, p = ((z / teaching.temperature).log_softmax(-1) for z in (logits, theirs))

    def kl(one, other):
        return F.kl_div(other, one, reduction="none", log_target=True).sum(-1)

    mix = teaching.mix
    middle = (mix * p.exp() + (1 - mix) * q.exp()).log()
    each = {0: lambda: kl(p, q), 1: lambda: kl(q, p)}.get(mix, lambda: mix * kl(p, middle) + (1 - mix) * kl(q, middle))
    valid = labels != IGNORE_INDEX
    factors = (weights if weights is not None else torch.ones(len(x))).double().where(valid, 0.0)
    divergence = (each() * factors).sum()
    ce = (F.cross_entropy(logits, labels.where(valid, 0), reduction="none") * factors).sum()
    loss = (1 - teaching.share) * ce + teaching.share * teaching.temperature**2 * divergence
    return (loss.detach(), ce.detach(), divergence.detach()), torch.autograd.grad(3 * loss, [x, weight])


def error(found, true):
    return float((found.detach().double() - true).abs().max() / true.abs().max().clamp(min=1e-300))


def compute(form, x, weight, labels, weights, teaching, chunk):
    if form == "whole":
        return linear_distillation(x, weight, labels, weights, teaching)
    if form == "logits":
        return distillation_of_logits(F.linear(x, weight), labels, weights, teaching)
    return chunked_linear_distillation(x, weight, labels, weights, teaching, chunk * len(weight) * 4)


@pytest.mark.parametrize(("rows", "width", "vocab", "chunk"), SHAPES)
@pytest.mark.parametrize("form", ["whole", "chunks", "logits"])
@pytest.mark.parametrize(
    "how",
    [
        dict(share=0.5),
        dict(share=1.0, temperature=3.0),
        dict(share=0.3, temperature=2.0, mix=1.0),
        dict(share=0.7, temperature=0.5, mix=0.25),
    ],
    ids=str,
)
def test_sums_and_gradients_are_those_of_the_definition(rows, width, vocab, chunk, form, how):
    x, weight, labels, weights, teaching = problem(rows, width, vocab, **how)
    if vocab == 11:
        weights = None
    found = compute(form, x, weight, labels, weights, teaching, chunk)
    true, gradients = truth(x, weight, labels, weights, teaching)
    assert [one.dtype for one in found] == [torch.float32] * 3
    for mine, theirs in zip(found, true, strict=True):
        assert error(mine, theirs) < 1e-5
    for mine, theirs in zip(torch.autograd.grad(3 * found[0], [x, weight]), gradients, strict=True):
        assert mine.shape == theirs.shape and error(mine, theirs) < 1e-5


@pytest.mark.parametrize("form", ["chunks", "logits"])
def test_sixteen_bits_are_rounded_once(form):
    x, weight, labels, weights, teaching = problem(64, 32, 301, torch.bfloat16, share=0.5, temperature=2.0)
    found = compute(form, x, weight, labels, weights, teaching, 16)
    true, gradients = truth(x, weight, labels, weights, teaching)
    assert error(found[0], true[0]) < 4 * torch.finfo(torch.bfloat16).eps
    for mine, theirs in zip(torch.autograd.grad(3 * found[0], [x, weight]), gradients, strict=True):
        assert mine.dtype == torch.bfloat16 and error(mine, theirs) < 0.05


def test_chunks_hold_no_logits_of_all_rows():
    """The largest tensor that the chunked version makes is the gradient of the weight, not N x V."""
    rows, width, vocab = 512, 8, 64
    x, weight, labels, weights, teaching = problem(rows, width, vocab, share=0.5)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for one in torch.utils._pytree.tree_leaves(result):
                if isinstance(one, torch.Tensor):
                    largest = max(largest, one.numel())
            return result

    with Sizes():
        loss, *_ = chunked_linear_distillation(x, weight, labels, weights, teaching, 16 * vocab * 4)
        loss.backward()
    assert largest < rows * vocab // 4

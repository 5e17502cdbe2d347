"""Head and loss in chunks, against a float64 reference of its own and against the memory that the plain form takes."""

from __future__ import annotations

import resource

import pytest
import torch
from torch.nn import functional as F

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.linear_cross_entropy import chunked_linear_cross_entropy_sum, linear_cross_entropy_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(rows, width, vocab, dtype=torch.float32, weighted=True, scale=1.0):
    generator = torch.Generator().manual_seed(rows + width + vocab)
    x = torch.randn(rows, width, generator=generator).mul(scale).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).div(width**0.5).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::5] = IGNORE_INDEX
    weights = torch.rand(rows, generator=generator).to(DEVICE) if weighted else None
    return x, weight, labels.to(DEVICE), weights


def truth(x, weight, labels, weights, g):
    """Loss and gradients in float64, from the definition."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = x @ weight.T
    lse = logits.logsumexp(-1)
    valid = labels != IGNORE_INDEX
    picked = logits.gather(-1, labels.where(valid, 0)[:, None])[:, 0]
    losses = (lse - picked) * (1.0 if weights is None else weights.double())
    total = losses.where(valid, 0.0).sum()
    return total.detach(), *torch.autograd.grad(total * g, [x, weight])


def error(found, true):
    return float((found.detach().double() - true).abs().max() / true.abs().max().clamp(min=1e-300))


def distance(found, true):
    """All elements together: the largest alone is a matter of luck in 16 bits."""
    return float((found.detach().double() - true).norm() / true.norm().clamp(min=1e-300))


@pytest.mark.parametrize(
    ("rows", "width", "vocab", "chunk_rows"),
    [(7, 5, 11, 3), (1, 4, 9, 1), (6, 1, 5, 100), (13, 16, 257, 4), (9, 8, 50257, 4), (3, 4, 128256, 2), (8, 8, 1, 4)],
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_chunks_give_the_loss_and_gradients_of_the_whole(rows, width, vocab, chunk_rows, weighted, fused):
    x, weight, labels, weights = problem(rows, width, vocab, weighted=weighted)
    size = chunk_rows * vocab * 4
    loss = chunked_linear_cross_entropy_sum(x, weight, labels, weights, chunk_bytes=size, fused=fused)
    found = torch.autograd.grad(loss * 0.25, [x, weight])
    true = truth(x, weight, labels, weights, 0.25)
    assert loss.dtype == torch.float32
    for mine, theirs in zip((loss.detach(), *found), true, strict=True):
        assert mine.shape == theirs.shape and error(mine, theirs) < 1e-5


@pytest.mark.parametrize("vocab", [31, 50257])
@pytest.mark.parametrize("fused", [False, True])
def test_rows_padded_as_on_a_gpu_give_the_same(vocab, fused, monkeypatch):
    """On a CPU, too, where nothing is padded: loss and gradients of rows that a GPU pads."""
    from megatrain.kernels import linear_cross_entropy

    monkeypatch.setattr(linear_cross_entropy, "padding_rows", lambda weight: 64 - len(weight) % 64)
    x, weight, labels, weights = problem(9, 8, vocab)
    size = 4 * (vocab + 64) * 4
    loss = chunked_linear_cross_entropy_sum(x, weight, labels, weights, chunk_bytes=size, fused=fused)
    found = torch.autograd.grad(loss * 0.25, [x, weight])
    for mine, theirs in zip((loss.detach(), *found), truth(x, weight, labels, weights, 0.25), strict=True):
        assert mine.shape == theirs.shape and error(mine, theirs) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_chunks_err_no_more_than_the_plain_form(dtype):
    x, weight, labels, weights = problem(48, 32, 1003, dtype)
    true = truth(x, weight, labels, weights, 1.0)
    errors = []
    for form in (linear_cross_entropy_sum, lambda *given: chunked_linear_cross_entropy_sum(*given, 16 * 1003 * 2)):
        loss = form(x, weight, labels, weights)
        gradients = torch.autograd.grad(loss, [x, weight])
        assert all(g.dtype == dtype for g in gradients)
        errors.append([distance(value, right) for value, right in zip((loss.detach(), *gradients), true, strict=True)])
    for plain, chunked in zip(*errors, strict=True):
        assert chunked <= 1.05 * plain + 1e-4, errors


def test_shapes_of_batches_and_inputs_that_are_not_contiguous():
    x, weight, labels, weights = problem(12, 6, 31)
    plain = linear_cross_entropy_sum(x, weight, labels, weights)
    wide = torch.stack([x.detach(), x.detach()], -1).requires_grad_()
    loss = chunked_linear_cross_entropy_sum(
        wide[..., 0].view(3, 4, 6), weight, labels.view(3, 4), weights.view(3, 4), chunk_bytes=5 * 31 * 4
    )
    torch.testing.assert_close(loss, plain)
    (d_wide,) = torch.autograd.grad(loss, [wide])
    (d_x,) = torch.autograd.grad(plain, [x])
    torch.testing.assert_close(d_wide[..., 0], d_x)
    assert not d_wide[..., 1].any()


@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_extreme_logits_stay_finite(scale):
    x, weight, labels, weights = problem(10, 8, 100, scale=scale)
    loss = chunked_linear_cross_entropy_sum(x, weight, labels, weights)
    true = truth(x, weight, labels, weights, 1.0)
    assert error(loss.detach(), true[0]) < 1e-5
    for mine, theirs in zip(torch.autograd.grad(loss, [x, weight]), true[1:], strict=True):
        assert error(mine, theirs) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(value):
    x, weight, labels, weights = problem(10, 8, 100)
    spoilt = x.detach().clone()
    spoilt[6, 3] = value
    spoilt.requires_grad_()
    loss = chunked_linear_cross_entropy_sum(spoilt, weight, labels, weights, chunk_bytes=4 * 100 * 4)
    assert not torch.isfinite(loss)
    assert not torch.isfinite(torch.autograd.grad(loss, [weight])[0]).all()


def test_nothing_valid_and_no_rows_at_all():
    x, weight, labels, _ = problem(6, 4, 9)
    for rows in (6, 0):
        loss = chunked_linear_cross_entropy_sum(x[:rows], weight, torch.full_like(labels[:rows], IGNORE_INDEX))
        gradients = torch.autograd.grad(loss, [x, weight])
        assert loss == 0.0 and not any(g.any() for g in gradients)


def test_without_gradients_the_loss_is_the_same_bits():
    x, weight, labels, weights = problem(10, 8, 100)
    with_gradients = chunked_linear_cross_entropy_sum(x, weight, labels, weights)
    with torch.no_grad():
        assert torch.equal(chunked_linear_cross_entropy_sum(x, weight, labels, weights), with_gradients.detach())


def test_it_repeats_bit_for_bit():
    x, weight, labels, weights = problem(40, 16, 300)
    runs = []
    for _ in range(2):
        loss = chunked_linear_cross_entropy_sum(x, weight, labels, weights, chunk_bytes=7 * 300 * 4)
        runs.append([loss, *torch.autograd.grad(loss, [x, weight])])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_compile_traces_through():
    x, weight, labels, weights = problem(10, 8, 100)
    plain = chunked_linear_cross_entropy_sum(x, weight, labels, weights)
    traced = torch.compile(chunked_linear_cross_entropy_sum, fullgraph=True, backend="aot_eager")
    loss = traced(x, weight, labels, weights)
    assert torch.equal(loss, plain)
    for one, other in zip(*(torch.autograd.grad(value, [x, weight]) for value in (loss, plain)), strict=True):
        assert torch.equal(one, other)


def test_never_are_all_logits_in_memory():
    """Peak memory over what is there before and what must come out (the gradients), in a process of its own."""

    def peak(form):
        import os

        reading, writing = os.pipe()
        if not (child := os.fork()):
            try:
                x, weight, labels, weights = problem(2048, 8, 20000)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                torch.autograd.grad(form(x, weight, labels, weights), [x, weight])
                used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
                os.write(writing, str(used).encode())
            finally:
                os._exit(0)
        os.close(writing)  # or reading would wait for a child that died
        os.waitpid(child, 0)
        with os.fdopen(reading) as pipe:
            return int(pipe.read())

    if DEVICE == "cuda":
        x, weight, labels, weights = problem(2048, 8, 20000)
        used = []
        for form in (linear_cross_entropy_sum, in_small_chunks):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(form(x, weight, labels, weights), [x, weight])
            used.append(torch.cuda.max_memory_allocated() - before)
        plain, chunked = used
    else:
        plain, chunked = peak(linear_cross_entropy_sum), peak(in_small_chunks)
    assert chunked < 0.25 * plain, (chunked, plain)


def in_small_chunks(*given):
    return chunked_linear_cross_entropy_sum(*given, chunk_bytes=16 * 2**20)


def test_the_head_gives_its_loss_only_where_there_are_labels():
    """Through the model: logits without labels, and with them the loss of these logits."""
    from megatrain.kernels.choice import CHUNKED, REFERENCE
    from megatrain.model.gpt import Head

    plain, chunked = (Head(8, 31, kernels, None).to(DEVICE) for kernels in (REFERENCE, CHUNKED))
    x, weight, labels, weights = problem(12, 8, 31)
    for head in (plain, chunked):
        head.weight.data.copy_(weight.detach())
    torch.testing.assert_close(chunked(x), F.linear(x, weight))
    torch.testing.assert_close(chunked(x, labels, weights), plain(x, labels, weights))

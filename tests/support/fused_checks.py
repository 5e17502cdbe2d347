"""Checks of every fused operation: against float64, against PyTorch's own error, as an operator, and repeated.

Without a GPU, Triton's interpreter runs each operation of a kernel as a NumPy call, so the inputs have few rows.
With a GPU the same tests run the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatrain.kernels import IGNORE_INDEX

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return float64 values on the CPU that depend only on shape and seed."""
    generator = torch.Generator().manual_seed(seed * 1000 + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest difference divided by the largest exact value: elements near 0 have no relative precision."""
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    if exact.numel() == 0:
        return 0.0
    assert actual.isfinite().all(), "not finite"
    largest = float(exact.detach().abs().max()) or 1.0
    return float((actual.detach().double().cpu() - exact.detach()).abs().max()) / largest


def values_and_gradients(function: Callable[..., Any], inputs: Sequence[Any], gs: Sequence[Tensor]) -> list[Tensor]:
    """Return all outputs, then the gradient of every input that requires one, for gradients `gs` of the outputs."""
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    gs = [g.to(y.dtype).to(y.device).view(y.shape) for g, y in zip(gs, outputs, strict=True)]
    return outputs + list(torch.autograd.grad(outputs, wanted, gs))


def leaf(x: Any, dtype: torch.dtype, device: str) -> Any:
    """Return a floating tensor as a leaf that requires a gradient, with its strides; move anything else."""
    if not isinstance(x, Tensor):
        return x
    if not x.is_floating_point():
        return x.to(device)
    base = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)
    return base.requires_grad_(x.requires_grad)


def cross_entropy_case(num_tokens: int, vocab: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return float64 logits `[N, V]`, labels `[N]` (the second is ignored), and float weights `[N]` or None."""
    generator = torch.Generator().manual_seed(vocab)
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator)
    labels[0] = vocab - 1
    if num_tokens > 1:
        labels[1] = IGNORE_INDEX
    weights = torch.rand(num_tokens, generator=generator) + 0.5 if weighted else None
    return randn(num_tokens, vocab, scale=3.0), labels, weights


def exact_losses_and_gradient(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return cross-entropy by its formula: float64 losses `[N]` and the gradient `[N, V]` of their sum."""
    logits, labels = logits.detach().cpu().double().requires_grad_(), labels.cpu()
    picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    losses = (logits.logsumexp(-1) - picked) * (1 if weights is None else weights.cpu().double())
    losses = losses.where(labels != IGNORE_INDEX, 0.0)
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def wants(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors as inputs whose gradients are checked."""
    return [t.requires_grad_() for t in tensors]


def check_accuracy(
    fused: Callable[..., Any],
    reference: Callable[..., Any],
    formula: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype,
    constants: Sequence[Any] = (),
    fp32_error: float = 1e-5,
) -> None:
    """Check values and gradients in `dtype` against `formula` in float64 on the same rounded inputs.

    In fp32 the relative error must be at most `fp32_error`. In 16 bits it may exceed PyTorch's own error by at most
    eps / 100, for sums in another order. `constants` are further arguments and are not rounded.
    """
    given = [leaf(x, dtype, DEVICE) for x in inputs] + [leaf(c, torch.float32, DEVICE) for c in constants]
    exact_in = [
        x.detach().cpu().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else (x.cpu() if isinstance(x, Tensor) else x)
        for x in given
    ]
    shapes = formula(*exact_in)
    shapes = [shapes] if isinstance(shapes, Tensor) else list(shapes)
    gs = [randn(*y.shape, seed=9).to(dtype).double() for y in shapes]
    exact = values_and_gradients(formula, exact_in, gs)
    ours = values_and_gradients(fused, given, gs)
    theirs = values_and_gradients(reference, given, gs)
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.dtype == b.dtype, (i, a.dtype, b.dtype)
        limit = fp32_error if dtype == torch.float32 else error(b, c) + torch.finfo(dtype).eps / 100
        assert error(a, c) <= limit, f"result {i}: error {error(a, c):.2e}, allowed {limit:.2e}"


def check_operator(
    function: Callable[..., Any], operator: Any, inputs: Sequence[Any], operator_inputs: Sequence[Any] | None = None
) -> None:
    """Check that two runs are equal bit for bit, that torch.library accepts the operator, and that torch.compile traces
    it in one graph.

    `operator_inputs` are the operator's inputs if they differ from the function's.
    """
    given = [leaf(x, torch.float32, DEVICE) for x in inputs]

    def loss(*arguments: Any) -> Tensor:
        outputs = function(*arguments)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        return sum(((y * 1.5).sin().sum() for y in outputs), torch.zeros((), device=DEVICE))

    wanted = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    runs = [loss(*given), loss(*given)]
    gradients = [torch.autograd.grad(run, wanted) for run in runs]
    assert torch.equal(*runs)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)), "two runs differ"
    torch._dynamo.reset()
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(traced, runs[0])
    torch.testing.assert_close(torch.autograd.grad(traced, wanted), gradients[0])
    torch.library.opcheck(operator, tuple(given if operator_inputs is None else operator_inputs))

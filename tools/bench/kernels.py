"""Compare the fused kernels with the plain operations, torch.compile and Liger-Kernel: errors, time and bandwidth.

    python tools/bench/kernels.py             # GPU: times at the sizes of a Llama 8B, and errors
    python tools/bench/kernels.py --head      # GPU or CPU: time and memory of head and loss, in chunks and plain
    python tools/bench/kernels.py --linear    # CPU: linear layers in fp32 by oneDNN and by torch's default, and in bf16

Errors are norm-wise (largest difference over the largest exact value) against float64, outputs and gradients together.
Times are medians of forward and backward together, in one CUDA graph (which leaves out the host's time), with the forms
in turns. The bandwidth column compares what a kernel must at least read and write with the bandwidth of a 1 GiB copy in
the same run. Without a GPU, Triton's interpreter gives the errors at small sizes, and no times are measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from megatrain.kernels import cross_entropy, gelu, layer_norm, rms_norm, rope, swiglu  # noqa: E402
from megatrain.kernels.linear import linear, onednn_linear, prefers_onednn  # noqa: E402
from megatrain.kernels.linear_cross_entropy import (  # noqa: E402
    chunked_linear_cross_entropy_sum,
    linear_cross_entropy_sum,
)

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
ROUNDS = 20
COMPILED_HEAD = torch.compile(linear_cross_entropy_sum)


class FusedLossInPlace(torch.autograd.Function):
    """The fused cross-entropy, whose forward pass OVERWRITES the logits with the gradient of the summed loss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        losses = cross_entropy.fused_cross_entropy_with_gradient_(logits.detach(), labels)
        ctx.gradient = logits.detach()
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


@dataclass(frozen=True)
class Operation:
    """One operation at one size.

    `inputs` are made anew for each dtype. `numbers` is the least that forward and backward must read and write, in
    units of the largest input. `liger` is Liger-Kernel's form, if any. `constants` follow the inputs, in fp32 and
    without gradients. `exact` is the formula for float64, if the plain form rounds to fp32 inside.
    """

    name: str
    inputs: Callable[[], list[Tensor]]
    plain: Callable[..., Any]
    fused: Callable[..., Any]
    numbers: float
    liger: Callable[[], Callable[..., Any]] | None = None
    constants: Callable[[], list[Tensor]] = list
    exact: Callable[..., Any] | None = None


def operations(small: bool) -> list[Operation]:
    """Return the operations to measure, at the sizes of a Llama 8B with 8,192 tokens, or at small sizes."""
    rows, width, ffn, vocab = (64, 1000, 1000, 5003) if small else (8192, 4096, 14336, 128256)
    heads, kv_heads, head_dim = (4, 2, 16) if small else (32, 8, 128)
    some = rows // 4

    def queries_and_keys() -> list[Tensor]:
        return [torch.randn(1, rows, number, head_dim).transpose(1, 2) for number in (heads, kv_heads)]

    def exact_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turned(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

        return turned(q), turned(k)

    def exact_loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.logsumexp(-1) - logits.gather(-1, labels[:, None])[:, 0]).sum()

    def liger(name: str, function: str) -> Callable[[], Callable[..., Any]]:
        def find() -> Callable[..., Any]:
            import importlib

            apply: Callable[..., Any] = getattr(importlib.import_module(f"liger_kernel.ops.{name}"), function).apply
            return apply

        return find

    norm = [lambda: [torch.randn(rows, width), torch.rand(width) + 0.5]]
    added = [lambda: [torch.randn(rows, width), torch.randn(rows, width), torch.rand(width) + 0.5]]
    return [
        Operation(
            "RMSNorm",
            norm[0],
            lambda x, w: rms_norm.rms_norm(x, w, 1e-5),
            lambda x, w: rms_norm.fused_rms_norm(x, w, 1e-5),
            5,
            liger("rms_norm", "LigerRMSNormFunction"),
        ),
        Operation(
            "residual + RMSNorm",
            added[0],
            lambda x, r, w: rms_norm.add_rms_norm(x, r, w, 1e-5),
            lambda x, r, w: rms_norm.fused_add_rms_norm(x, r, w, 1e-5),
            8,
        ),
        Operation(
            "LayerNorm",
            norm[0],
            lambda x, w: layer_norm.layer_norm(x, w, None, 1e-5),
            lambda x, w: layer_norm.fused_layer_norm(x, w, None, 1e-5),
            5,
        ),
        Operation(
            "residual + LayerNorm",
            added[0],
            lambda x, r, w: layer_norm.add_layer_norm(x, r, w, None, 1e-5),
            lambda x, r, w: layer_norm.fused_add_layer_norm(x, r, w, None, 1e-5),
            8,
        ),
        Operation(
            "RoPE, q and k",
            queries_and_keys,
            rope.rope_qk,
            rope.fused_rope_qk,
            4 * (heads + kv_heads) / heads,
            constants=lambda: list(rope.rope_angles(torch.arange(rows), head_dim, 10000.0)),
            exact=exact_rope,
        ),
        Operation(
            "SwiGLU",
            lambda: [torch.randn(rows, ffn), torch.randn(rows, ffn)],
            swiglu.swiglu,
            swiglu.fused_swiglu,
            8,
            liger("swiglu", "LigerSiLUMulFunction"),
        ),
        Operation("GELU", lambda: [torch.randn(rows, ffn)], gelu.gelu, gelu.fused_gelu, 5),
        Operation(
            "cross-entropy",
            lambda: [torch.randn(some, vocab) * 4, torch.randint(0, vocab, (some,))],
            cross_entropy.cross_entropy_sum,
            FusedLossInPlace.apply,
            3,
            exact=exact_loss,
        ),
    ]


def ready(operation: Operation, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the arguments on the device; floating-point inputs in `dtype`, with gradients."""
    moved = [t.to(DEVICE, dtype, copy=True).requires_grad_() if t.is_floating_point() else t.to(DEVICE) for t in inputs]
    return [*moved, *(t.to(DEVICE) for t in operation.constants())]


def run(form: Callable[..., Any], given: Sequence[Tensor], grads: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return outputs and gradients, for `grads` of the outputs (default: ones)."""
    outputs = form(*given)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [t for t in given if t.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, grads or [torch.ones_like(y) for y in outputs], allow_unused=True)
    return [*(y.detach() for y in outputs), *(g for g in gradients if g is not None)]


def graphed(form: Callable[..., Any], given: Sequence[Tensor]) -> Callable[[], None]:
    """Capture forward and backward in a CUDA graph; each call of the result runs it once."""
    with torch.no_grad():
        outputs = form(*given)
    grads = [torch.randn_like(y) for y in ([outputs] if isinstance(outputs, Tensor) else outputs)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(form, given, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(form, given, grads)
    return graph.replay


def error(operation: Operation, form: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Return a form's error in `dtype` against float64 on the same rounded inputs."""
    given = ready(operation, inputs, dtype)
    doubled = [t.detach().double().requires_grad_() if t.requires_grad else t for t in given]
    exact, found = run(operation.exact or operation.plain, doubled), run(form, given)
    return max(
        float((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-300))
        for a, b in zip(found, exact, strict=True)
    )


def median_ms(forms: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the milliseconds of each form, in turns, by CUDA events."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        for _ in range(3):
            form()
    for _ in range(ROUNDS):
        for name, form in forms.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            form()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth() -> float:
    """Return the bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 2**30 / (median_ms({"copy": lambda: target.copy_(source)})["copy"] / 1e3)


def speed(operation: Operation, bandwidth: float) -> list[str]:
    """Return the milliseconds of each form in bf16, and the fused form's share of the bandwidth."""
    torch.compiler.reset()
    with DEVICE:  # drawing them on the host takes seconds
        given = ready(operation, operation.inputs(), torch.bfloat16)
    wanted: dict[str, Callable[..., Any]] = {
        "fused": operation.fused, "plain": operation.plain, "compiled": torch.compile(operation.plain)
    }  # fmt: skip
    if operation.liger is not None:
        arguments = (1e-5,) if "norm" in operation.name.lower() else ()
        liger = operation.liger
        wanted["liger"] = lambda *tensors: liger()(*tensors, *arguments)
    forms = {}
    for name, form in wanted.items():
        try:
            forms[name] = graphed(form, given)
        except Exception as reason:
            print(f"{operation.name}: {name} not measured: {type(reason).__name__}: {str(reason)[:200]}", flush=True)
    if "fused" not in forms:
        return ["not measured", "", "", "", ""]
    found = median_ms(forms)
    size = max(t.numel() * t.element_size() for t in given)
    share = operation.numbers * size / bandwidth / (found["fused"] / 1e3)
    others = [f"{found[name]:.3f}" if name in found else "-" for name in ("plain", "compiled", "liger")]
    return [f"{found['fused']:.3f}", f"{100 * share:.0f}%", *others]


def kernels() -> None:
    """Print the table of all operations."""
    bandwidth = copy_bandwidth() if HAS_GPU else None
    if bandwidth:
        print(f"copy: {bandwidth / 1e9:,.0f} GB/s on {torch.cuda.get_device_name()}")
    print(
        "| operation | fp32 error (PyTorch's) | bf16 error (PyTorch's) | ms | of the copy's bandwidth "
        "| plain | compiled | Liger |"
    )
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for small, operation in zip(operations(True), operations(False), strict=True):
        inputs = small.inputs()
        errors = [
            f"{error(small, small.fused, inputs, dtype):.1e} ({error(small, small.plain, inputs, dtype):.1e})"
            for dtype in (torch.float32, torch.bfloat16)
        ]
        times = speed(operation, bandwidth) if bandwidth else ["not measured", "", "", "", ""]
        print(f"| {small.name} | {' | '.join([*errors, *times])} |", flush=True)


# ------------------------------------------------------------------------------------------- head and loss


def head_turn(name: str, rows: int, width: int, vocab: int, rounds: int) -> tuple[float, int]:
    """Measure one form of head and loss: median seconds, and the peak of additional memory."""
    dtype = torch.bfloat16 if HAS_GPU else torch.float32
    x = torch.randn(rows, width, device=DEVICE, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, device=DEVICE, dtype=dtype).div_(width**0.5).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), device=DEVICE)
    forms: dict[str, Callable[..., torch.Tensor]] = {
        "plain": linear_cross_entropy_sum,
        "compiled": COMPILED_HEAD,
        "chunks": partial(chunked_linear_cross_entropy_sum, fused=HAS_GPU),
    }
    form = forms[name]
    times = []
    if HAS_GPU:
        torch.autograd.grad(form(x, weight, labels), [x, weight])  # compiles; the peak is of what follows
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if HAS_GPU else psutil.Process().memory_info().rss
    for _ in range(rounds + 1):
        started = time.perf_counter()
        torch.autograd.grad(form(x, weight, labels), [x, weight])
        if HAS_GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if HAS_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return statistics.median(times[1:]), peak - before


def head_turn_apart(*arguments: Any) -> tuple[float, int]:
    """Run `head_turn`, on a CPU in a new process, because peak memory is per process."""
    if HAS_GPU:
        return head_turn(*arguments)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(head_turn, *arguments).result()


def head(rows: int, width: int, vocab: int, turns: int, rounds: int) -> None:
    """Measure head and loss, forward and backward, the forms in turns."""
    print(
        f"head and loss, {rows} tokens, width {width}, vocabulary {vocab}, {DEVICE}, {torch.get_num_threads()} threads"
    )
    torch.compiler.reset()  # or other sizes than before would be taken for sizes that change
    found: dict[str, list[tuple[float, int]]] = {"plain": [], "compiled": [], "chunks": []}
    for _ in range(turns):
        for name, figures in found.items():
            figures.append(head_turn_apart(name, rows, width, vocab, rounds))
    print("| form | seconds, median | time over the chunks', median of turns | MiB added at the peak |")
    print("| --- | ---: | ---: | ---: |")
    for name, figures in found.items():
        ratios = [mine[0] / chunks[0] for mine, chunks in zip(figures, found["chunks"], strict=True)]
        seconds, memory = (statistics.median(values) for values in zip(*figures, strict=True))
        print(f"| {name} | {seconds:.3f} | {statistics.median(ratios):.3f} | {memory / 2**20:,.0f} |")
    print(json.dumps(found))


# ------------------------------------------------------------------------------------------- linear layers


def linear_layers(tokens: int, sizes: Sequence[tuple[int, int]], turns: int) -> None:
    """Measure linear layers on a CPU, forward and backward, the forms in turns; errors against float64."""
    print(f"linear layers, {tokens} tokens, {torch.get_num_threads()} threads; oneDNN preferred: {prefers_onednn()}")
    print(
        "| inputs x outputs | torch, ms | oneDNN, ms | torch in bf16, ms | torch's over oneDNN's "
        "| errors, torch, oneDNN |"
    )
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    forms = {
        "torch": (linear, torch.float32),
        "onednn": (onednn_linear, torch.float32),
        "bf16": (linear, torch.bfloat16),
    }
    for inputs, outputs in sizes:
        exact = [torch.randn(tokens, inputs), torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)]
        g = torch.randn(tokens, outputs)

        def results(
            form: Callable[..., Any], dtype: torch.dtype, values: Sequence[Tensor] = exact, g: Tensor = g
        ) -> Any:
            given = [value.to(dtype).requires_grad_() for value in values]
            began = time.perf_counter()
            y = form(*given)
            found = [y.detach(), *torch.autograd.grad(y, given, g.to(dtype))]
            return time.perf_counter() - began, found

        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(turns + 1):
            for name, (form, dtype) in forms.items():
                times[name].append(1e3 * results(form, dtype)[0])
        true = results(linear, torch.float64)[1]
        errors = [
            max(
                float((a.double() - b).abs().max() / b.abs().max())
                for a, b in zip(results(*form)[1], true, strict=True)
            )
            for form in (forms["torch"], forms["onednn"])
        ]
        median = {name: statistics.median(values[1:]) for name, values in times.items()}
        ratio = statistics.median(a / b for a, b in zip(times["torch"][1:], times["onednn"][1:], strict=True))
        milliseconds = " | ".join(f"{median[name]:.2f}" for name in forms)
        print(
            f"| {inputs:,} x {outputs:,} | {milliseconds} | {ratio:.2f} | {errors[0]:.1e}, {errors[1]:.1e} |",
            flush=True,
        )


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", action="store_true", help="head and loss alone")
    parser.add_argument("--linear", action="store_true", help="linear layers alone, on a CPU")
    parser.add_argument("--tokens", type=int, default=8192 if HAS_GPU else 1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions in a turn")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.linear:
        sizes = [(128, 128), (128, 512), (256, 1024), (768, 768), (768, 3072), (3072, 768)]
        linear_layers(arguments.tokens, sizes, arguments.turns)
    elif arguments.head:
        head(arguments.tokens, arguments.width, arguments.vocab, arguments.turns, arguments.rounds)
    else:
        kernels()
        if HAS_GPU:
            head(8192, 768, 50257, 5, 5)
            head(8192, 4096, 128256, 3, 3)


if __name__ == "__main__":
    main()

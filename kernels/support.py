"""What the fused kernels share: Triton if it is installed, checks of what it supports, and block sizes. No mathematics.

The other files import `jit` and `tl` from here. They can be imported without Triton; calling a fused operation then
raises `KernelError`. The environment variable TRITON_INTERPRET=1, which selects Triton's interpreter instead of a GPU,
is read on import.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatrain.kernels import MAX_ROW

__all__ = [
    "HAVE_TRITON",
    "INTERPRETED",
    "KernelError",
    "as_rows",
    "ceil_div",
    "compute_dtype",
    "compute_type",
    "jit",
    "launch",
    "next_power_of_2",
    "num_programs",
    "num_warps",
    "require",
    "rounded",
    "tl",
    "triton_type",
    "unsupported",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class KernelError(RuntimeError):
    """Raised when a fused operation cannot run; the message says why."""


class _Absent:
    """A stand-in for `triton` where it cannot be imported: any use of it raises `KernelError`."""

    def __getattr__(self, name: str) -> Any:
        raise KernelError(f"{_MISSING} (triton.{name})")


_MISSING = "Triton is not installed, or older than 3.6: `pip install triton` (Linux), or use the plain references"

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)
    _IN_INTERPRETER: Any = tl.constexpr(INTERPRETED)
except (ImportError, AttributeError):  # missing, or too old to have `knobs`
    triton = tl = _Absent()
    HAVE_TRITON = INTERPRETED = _IN_INTERPRETER = False


def jit(function: _Function) -> _Function:
    """Return `triton.jit(function)`, or the function itself without Triton, so that kernels can still be defined."""
    if not HAVE_TRITON:
        return function
    kernel: _Function = triton.jit(function)
    return kernel


@jit
def rounded(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Return `x` in `dtype`, rounded to nearest even.

    Kernels use it instead of `x.to(dtype)`, because Triton's interpreter truncates to bf16.
    """
    if _IN_INTERPRETER and dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, up.to(tl.float32, bitcast=True), float("nan"))
    return x.to(dtype)


def unsupported(*tensors: Tensor | None, row: int | None = None) -> str | None:
    """Return why Triton cannot take these tensors, or None if it can.

    `row` is the width of a row that must fit in one block (the norms). Values are not read, so this is cheap enough to
    run on every call.
    """
    if not HAVE_TRITON:
        return _MISSING
    given = [t for t in tensors if t is not None]
    for t in given:
        if t.device != given[0].device:
            return f"tensors are on {given[0].device} and on {t.device}"
        if t.device.type != "cuda" and not (INTERPRETED and t.device.type == "cpu"):
            return f"a tensor is on {t.device}: Triton needs a GPU, or its interpreter (TRITON_INTERPRET=1) on a CPU"
        if t.is_floating_point() and t.dtype not in _DTYPES:
            return f"a tensor is {t.dtype}; kernels take float32, bfloat16, float16 and float64"
        if t.device.type == "cuda" and torch.cuda.get_device_capability(t.device) < (8, 0):
            return f"{torch.cuda.get_device_name(t.device)} is too old: Triton needs compute capability 8.0"
    if row is not None and not 0 < row <= MAX_ROW:
        return f"a row of {row} does not fit in one block (1 to {MAX_ROW})"
    return None


def require(*tensors: Tensor | None, row: int | None = None) -> None:
    """Raise `KernelError` with the reason that `unsupported` returns, if any."""
    reason = unsupported(*tensors, row=row)
    if reason is not None:
        raise KernelError(reason)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run `kernel` over `grid` on the first tensor's device; do nothing for an empty grid."""
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **constants)


def compute_type(*tensors: Tensor) -> Any:
    """Return the Triton type in which a kernel computes: float64 if any tensor is float64, else float32."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return `compute_type` as a torch dtype."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def triton_type(dtype: torch.dtype) -> Any:
    """Return the Triton type of a floating-point dtype."""
    return {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float64: tl.float64,
    }[dtype]


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least `n`. Triton's block sizes must be powers of two."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(n: int, size: int) -> int:
    """Return how many blocks of `size` hold `n` elements."""
    return -(-n // size)


def num_warps(block: int) -> int:
    """Return the number of warps for a block of this many elements: one per 512, at least 4 and at most 16."""
    return min(max(next_power_of_2(ceil_div(block, 512)), 4), 16)


def num_programs(tensor: Tensor) -> int:
    """Return the number of programs for a kernel whose programs each keep a partial sum: a few per multiprocessor.

    It depends on the device alone. So does the order of summation, which makes results reproducible bit for bit.
    """
    if tensor.device.type == "cuda":
        return 4 * torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 4


def as_rows(x: Tensor) -> Tensor:
    """Return `x` `[..., D]` as `[N, D]`, each row contiguous in memory. Copies only if the strides require it."""
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()

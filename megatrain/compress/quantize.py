"""Quantise the weights of the linear layers inside blocks, tensor by tensor. `model/quantized.py` has the numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatrain.compress.result import Described
from megatrain.errors import ConfigError
from megatrain.interop.source import MODEL, Source
from megatrain.model.count import parameter_shapes
from megatrain.model.quantized import SCALE, is_quantizable, quantize


def check_groups(source: Source, group: int) -> None:
    """Check that groups of inputs fill the rows of every matrix. Raises ConfigError with a size that does."""
    widths = {shape[1] for name, shape in parameter_shapes(source.config).items() if is_quantizable(name, shape)}
    if group % 2 == 0 and not any(width % group for width in widths):
        return
    fitting = [size for size in (256, 128, 64, 32, 16, 8, 4, 2) if not any(width % size for width in widths)]
    nearest = min(fitting, key=lambda size: abs(size - group)) if fitting else None
    advice = f"give group_size={nearest}" if nearest else "its widths are odd; use to=int8"
    listed = ", ".join(map(str, sorted(widths)))
    raise ConfigError(
        f"group_size={group}: groups must be even and fill the rows of every matrix, of {listed} values; {advice}"
    )


def describe_quantized(source: Source, kind: str, group: int, dtype: torch.dtype) -> Described:
    """Return what a quantised checkpoint holds: `<kind>.<name>` and `scale.<name>`, and `model.<name>` in `dtype`."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in parameter_shapes(source.config).items():
        if not is_quantizable(name, shape):
            found[MODEL + name] = (dtype, shape)
            continue
        rows, columns = shape
        eight = kind == "int8"
        found[f"{kind}.{name}"] = (torch.int8, shape) if eight else (torch.uint8, (rows, columns // 2))
        found[f"{SCALE}.{name}"] = (torch.float32, (rows, 1 if eight else columns // group))
    return found


def quantized_tensors(source: Source, kind: str, group: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the tensors of `describe_quantized`, in its order. Raises ConfigError if `dtype` cannot hold a value."""
    for name, tensor in source.tensors():
        if is_quantizable(name, tuple(tensor.shape)):
            made = quantize(tensor, kind, group)
            yield made.values.contiguous()
            yield made.scale.contiguous()
            continue
        narrow = tensor.to(dtype)
        if not bool(torch.isfinite(narrow).all()):
            raise ConfigError(f"dtype: tensor {name} has values beyond the range of {dtype}; use dtype=bf16 or fp32")
        yield narrow.contiguous()

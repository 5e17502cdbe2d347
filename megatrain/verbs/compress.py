"""`megatrain compress`: a model in fewer bits, with fewer weights, or as a GGUF file. The room `compress/` computes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.lineage import find_line
from megatrain.compress.prune import GROUP, share_threshold, tensor_threshold, two_of_four, without_small
from megatrain.compress.quantize import check_groups, describe_quantized, quantized_tensors
from megatrain.compress.result import check_space, write_result
from megatrain.config import CompressConfig
from megatrain.errors import ConfigError, cannot_write
from megatrain.interop.gguf_file import check_gguf, read_gguf, write_gguf
from megatrain.interop.load_model import load
from megatrain.interop.source import MODEL, Source, open_source
from megatrain.model.count import parameter_shapes
from megatrain.model.dtypes import DTYPES
from megatrain.model.quantized import is_quantizable
from megatrain.resilience.atomic_file import remove_abandoned, temporary_name
from megatrain.verbs.comparison import Row, print_comparison, with_losses
from megatrain.verbs.export import generation
from megatrain.verbs.path_checks import refuse_existing

READS = {
    "group_size": ("int4",),
    "dtype": ("int8", "int4"),
    "share": ("pruned",),
    "within": ("pruned",),
    "gguf_type": ("gguf",),
}
"""The results that read a key."""

BYTES = {"f32": 128, "f16": 64, "q8_0": 34, "q4_0": 18}
"""Bytes of 32 values in a GGUF file."""


def compress(config: CompressConfig) -> None:
    """Write `out`, and print size, speed and held-out loss before and after.

    Raises:
        ConfigError: `out` exists, or the model's shape or family does not allow the result.
        CheckpointError: there is no intact model, or it is quantised already.
        EnvironmentFault: the disk has no room, or a library is missing.
    """
    out = Path(config.out)
    refuse_existing(out)
    check_keys(config)
    source = open_source(Path(config.path), config.step)
    if config.to == "gguf":
        to_gguf(config, source, out)
        return
    settings = {name: getattr(config, name) for name, results in READS.items() if config.to in results}
    made = {"verb": "compress", "to": config.to, **settings, "sources": [source.reference()]}
    if config.to in ("int8", "int4"):
        dtype = DTYPES[config.dtype]
        if config.to == "int4":
            check_groups(source, config.group_size)
        described = describe_quantized(source, config.to, config.group_size, dtype)
        tensors = quantized_tensors(source, config.to, config.group_size, dtype)
        write_result(out, described, tensors, [source], made)
    else:
        described = {MODEL + name: (torch.float32, shape) for name, shape in parameter_shapes(source.config).items()}
        write_result(out, described, pruned_tensors(source, config), [source], made)
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in described.values())
    after = f"{config.to}, {zeros(open_source(out)):.1%} zeros" if config.to in ("pruned", "2:4") else config.to
    rows = [Row(str(source.folder), source.step, source.bytes), Row(f"{out} ({after})", None, size)]
    print_comparison(out, with_losses(rows, [source.folder, out], config, speed=True))


def to_gguf(config: CompressConfig, source: Source, out: Path) -> None:
    """Write a GGUF file atomically, and print the held-out loss of what can be read back from it. Raises as above."""
    check_gguf(source.config, config.gguf_type)
    numbers = sum(math.prod(shape) for shape in parameter_shapes(source.config).values())
    check_space(out, numbers * BYTES[config.gguf_type] // 32)
    loaded = load(source.folder)
    if loaded.tokenizer is not None:
        loaded.need_tokenizer()
    ends = generation(loaded).get("eos_token_id", [])
    remove_abandoned(out.parent)
    partial = temporary_name(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        listed = ends if isinstance(ends, list) else [ends]
        name, line = source.folder.name, find_line(source.folder)
        write_gguf(partial, source.config, source.read, config.gguf_type, loaded.tokenizer, listed, name, line)
        os.replace(partial, out)
    except OSError as error:
        raise cannot_write(out, error, "out") from error
    finally:
        partial.unlink(missing_ok=True)
    rows = [
        Row(str(source.folder), source.step, source.bytes),
        Row(f"{out} ({config.gguf_type})", None, out.stat().st_size),
    ]
    back = replace(loaded, weights=read_gguf(out, source.config)) if config.compare else loaded
    print_comparison(out, with_losses(rows, [loaded, back], config))


def check_keys(config: CompressConfig) -> None:
    """Refuse keys that the result does not read: they would be ignored silently. Raises ConfigError."""
    defaults = CompressConfig(path="", out="")
    for name, results in READS.items():
        if getattr(config, name) != getattr(defaults, name) and config.to not in results:
            raise ConfigError(f"{name}: to={config.to} does not read it; it is for to={' or to='.join(results)}")


def pruned_tensors(source: Source, config: CompressConfig) -> Iterator[Tensor]:
    """Yield the tensors of the pruned model, in its order. Raises ConfigError if rows are no multiple of 4 for 2:4."""
    shapes = {name: shape for name, shape in parameter_shapes(source.config).items() if is_quantizable(name, shape)}
    odd = next((name for name, shape in shapes.items() if shape[1] % GROUP), None)
    if config.to == "2:4" and odd:
        raise ConfigError(
            f"to=2:4: {odd} has rows of {shapes[odd][1]} values, which is no multiple of 4; use to=pruned"
        )
    overall = share_threshold(source, config.share) if config.to == "pruned" and config.within == "model" else None
    for name, tensor in source.tensors():
        if name not in shapes:
            yield tensor.contiguous()
        elif config.to == "2:4":
            yield two_of_four(tensor).contiguous()
        else:
            threshold = overall if overall is not None else tensor_threshold(tensor, config.share)
            yield without_small(tensor, threshold).contiguous()


def zeros(source: Source) -> float:
    """Return the share of zeros among the weights of linear layers inside blocks."""
    counts = [
        (int((tensor == 0).sum()), tensor.numel())
        for name, tensor in source.tensors()
        if is_quantizable(name, tuple(tensor.shape))
    ]
    return sum(zero for zero, _ in counts) / sum(total for _, total in counts)

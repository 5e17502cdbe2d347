"""Whether a model and its cache fit the memory, known before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil
import torch

from megatrain.checkpoint.find import model_of, peek
from megatrain.config import ModelConfig, ServeConfig, ServeGroup
from megatrain.errors import ConfigError, MegatrainError
from megatrain.interop.hf_config import model_config
from megatrain.interop.path_kind import find_checkpoint
from megatrain.model.count import num_parameters
from megatrain.model.quantized import KINDS, SCALE

ROOM = 1.1
"""What a server needs, compared with its weights and its cache."""

_GIB = 2**30


@dataclass(frozen=True)
class StoredModel:
    """A model's config, the bytes of its weights as they are stored, and whether some are quantised."""

    config: ModelConfig
    num_bytes: int
    is_quantized: bool


def stored_model(path: Path, step: int | None) -> StoredModel | None:
    """Return what is known of the model at a path from its manifest or config.json; None if neither can be read."""
    try:
        found = peek(path if step is None else find_checkpoint(path, step))
        if found is not None:
            folder, manifest = found
            kept = tuple(f"{kind}." for kind in ("model", *KINDS, SCALE))
            entries = {name: entry for name, entry in manifest.tensors.items() if name.startswith(kept)}
            num_bytes = sum(prod(one.shape) * getattr(torch, one.dtype).itemsize for one in entries.values())
            return StoredModel(model_of(folder, manifest), num_bytes, any(not n.startswith("model.") for n in entries))
        config = model_config(json.loads((path / "config.json").read_text(encoding="utf-8-sig")), path / "config.json")
        return StoredModel(config, sum(file.stat().st_size for file in path.glob("*.safetensors")), False)
    except (MegatrainError, OSError, ValueError):
        return None  # whoever loads it says what is wrong


def precision_of(config: ServeGroup, device: torch.device, is_quantized: bool) -> torch.dtype:
    """Return the number format of weights and cache. Raises `ConfigError` for bf16 with quantised weights."""
    if is_quantized and config.precision == "bf16":
        raise ConfigError("serve.precision=bf16: a model with int8 or int4 weights computes in fp32; leave the key out")
    if config.precision is None:
        return torch.bfloat16 if device.type == "cuda" and not is_quantized else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def free_bytes(device: torch.device) -> int:
    """Return the memory that a device has left for this process; of a container, what its limit leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup")
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or no limit
        return free


def context_of(config: ServeGroup, model: ModelConfig) -> int:
    """Return the longest prompt with its reply, in tokens."""
    return min(model.max_seq_len, config.max_context or model.max_seq_len)


def check_memory(config: ServeConfig, model: StoredModel, device: torch.device, free: int) -> None:
    """Refuse what does not fit `free` bytes of a device's memory. Raises `ConfigError` with values that would fit."""
    group, shape = config.serve, model.config
    dtype = precision_of(group, device, model.is_quantized)
    # int4 weights take a byte each while they compute
    weights = 2 * model.num_bytes if model.is_quantized else num_parameters(shape) * dtype.itemsize
    context, slots = context_of(group, shape), group.max_concurrent
    token = 2 * shape.num_layers * shape.kv_heads * shape.head_dim * dtype.itemsize
    usable = free / ROOM / group.workers
    loading = weights + model.num_bytes if device.type == "cpu" else weights  # as stored, and as computed with
    if max(loading, weights + token * slots * context) <= usable:
        return
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    each = f" for each of serve.workers={group.workers}" if group.workers > 1 else ""
    said = (
        f"{usable / _GIB:.2f} GiB of memory are free{each}: the weights need {loading / _GIB:.2f} GiB in {name}, and "
        f"the cache {token * slots * context / _GIB:.2f} GiB, for serve.max_concurrent={slots} replies of "
        f"serve.max_context={context} tokens"
    )
    remedies = []
    left = usable - weights
    if loading <= usable:
        if fit := int(left // (token * context)):
            remedies.append(f"serve.max_concurrent={fit}")
        if fit := int(left // (token * slots)):
            remedies.append(f"serve.max_context={fit}")
    if name == "fp32" and not model.is_quantized:
        remedies.append("serve.precision=bf16, which halves both")
    if group.workers > 1:
        remedies.append("fewer serve.workers")
    raise ConfigError(f"{said}; give {', or '.join(remedies) or 'a machine with more memory, or a smaller model'}")

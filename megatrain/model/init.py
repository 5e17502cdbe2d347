"""Initial values, as a pure function of (seed, parameter name, flat index): the same bits however a model is sharded.

An engine asks for the range that it owns.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from megatrain.config import ModelConfig
from megatrain.model.gpt import GPT

BLOCK = 2**20
"""Elements that share a random generator. To reach the start of a range, fewer values than this are discarded."""


def initial_values(
    config: ModelConfig, name: str, shape: tuple[int, ...], seed: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """Return elements `[start, stop)` of one parameter's flattened initial value, fp32 on the CPU.

    `name` is the single-device name and `shape` that of the whole parameter. Norm weights are 1 and biases 0. All
    other values, embeddings included, are normal with mean 0 and standard deviation `config.init_std`. The two
    projections that write to the residual stream (`attn.o`, `mlp.down`) are scaled by `1/sqrt(2 * num_layers)`
    (Radford et al., 2019, section 2.3, with each projection counted as a residual layer). Of low-rank layers, the one
    at the input has the variance of peft's, and the one at the output is 0, so that they change nothing at first. A
    value head is 0.
    """
    stop = math.prod(shape) if stop is None else stop
    assert 0 <= start <= stop <= math.prod(shape), (name, shape, start, stop)
    if name == "value.weight" or name.endswith((".bias", ".lora_b")):
        return torch.zeros(stop - start)
    if len(shape) == 1:
        return torch.ones(stop - start)
    if name.endswith(".lora_a"):
        return _normal(name, seed, start, stop).mul_(1 / math.sqrt(3 * shape[1]))
    std = config.init_std
    if name.endswith(("attn.o.weight", "mlp.down.weight")):
        std /= math.sqrt(2 * config.num_layers)
    return _normal(name, seed, start, stop).mul_(std)


def initial_block(
    config: ModelConfig,
    name: str,
    shape: tuple[int, ...],
    seed: int,
    origin: tuple[int, ...],
    block: tuple[int, ...],
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    """Return elements `[start, stop)` of the flattened block of shape `block` that begins at `origin` in a parameter.

    The values are fp32 on the CPU, bit for bit those of `initial_values`. Only the rows in the range are generated.
    """
    stop = math.prod(block) if stop is None else stop
    if start >= stop:
        return torch.empty(0)
    row = math.prod(block[1:])  # elements in a row of the block
    whole_row = math.prod(shape[1:])  # and of the whole parameter
    first, last = start // row, -(-stop // row)
    base = (origin[0] + first) * whole_row
    rows = initial_values(config, name, shape, seed, base, base + (last - first) * whole_row)
    rows = rows.view(last - first, *shape[1:])
    for dimension in range(1, len(shape)):
        rows = rows.narrow(dimension, origin[dimension], block[dimension])
    return rows.reshape(-1)[start - first * row : stop - first * row]


def _normal(name: str, seed: int, start: int, stop: int) -> Tensor:
    """Return standard normal values `[start, stop)` of the endless stream for (seed, name)."""
    values = np.empty(stop - start, dtype=np.float32)

    def fill(block: int) -> None:
        """Draw the part of `values` that lies in elements `[block * BLOCK, (block + 1) * BLOCK)` of the stream."""
        first, last = max(start - block * BLOCK, 0), min(stop - block * BLOCK, BLOCK)
        # NumPy's generator takes the whole hash. torch's CPU generator keeps 32 bits of a seed, so some of the million
        # blocks of a large model would share a stream.
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
        drawn = generator.standard_normal(last, dtype=np.float32)
        offset = block * BLOCK + first - start
        values[offset : offset + last - first] = drawn[first:]

    blocks = range(start // BLOCK, -(-stop // BLOCK))
    if (workers := min(len(blocks), torch.get_num_threads())) > 1:
        with ThreadPoolExecutor(workers) as threads:  # drawing releases the GIL
            list(threads.map(fill, blocks))
    else:
        for block in blocks:
            fill(block)
    return torch.from_numpy(values)


def build_model(
    config: ModelConfig,
    seed: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """Return a whole model on one device, filled with its initial values.

    With `seed=None` the values are left uninitialised, for a caller that loads all of them.
    """
    with torch.device("meta"):
        model = GPT(config)
    model = model.to(dtype).to_empty(device=device)
    if seed is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shape = tuple(parameter.shape)
                parameter.copy_(initial_values(config, name, shape, seed).view(shape))
    return model

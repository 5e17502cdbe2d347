"""A whole model on one device with the weights of an engine, in any layout: to generate with, not to train.

Nothing goes through the disk. A single process shares the engine's memory where the number formats agree; otherwise the
ranks put the model together from their pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from megatrain.checkpoint.naming import parameter_key
from megatrain.checkpoint.piece import Piece
from megatrain.config import WITH_VALUES, TrainConfig
from megatrain.distributed.world import World
from megatrain.engine.common import DTYPES, choose_kernels
from megatrain.model.gpt import GPT
from megatrain.model.lora import add_adapters

BUCKET_BYTES = 2**28
"""Bytes of fp32 weights that one collective moves at most, unless a single parameter is larger."""


class WholeModel:
    """A model in eval mode on this rank's device, in the run's precision. `take` gives it an engine's weights."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.world = world
        with torch.device("meta"):
            model = GPT(config.model, choose_kernels(config, world.device), config.method.name in WITH_VALUES)
            if config.method.lora.rank:
                add_adapters(model, config.method.lora)
        self.model = model.to(DTYPES[config.precision.name]).to_empty(device=world.device).eval()
        self.model.requires_grad_(False)

    @torch.no_grad()
    def take(self, state: Mapping[str, Tensor], shares: bool = True) -> None:
        """Take the weights of `Engine.state`. All ranks must call it together.

        With `shares` they may be the engine's own memory, so that a later step changes them.
        """
        parameters = dict(self.model.named_parameters())
        if self.world.size == 1:
            for name, parameter in parameters.items():
                self._take_own(parameter, state[parameter_key(name)], shares)
            return
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        for name, whole in _whole_weights(state, shapes, self.world):
            parameters[name].copy_(whole)

    @torch.no_grad()
    def _take_own(self, parameter: nn.Parameter, held: Tensor, shares: bool) -> None:
        is_same = (
            shares and not isinstance(held, Piece) and held.dtype == parameter.dtype and held.device == parameter.device
        )
        if is_same:
            parameter.data = held.detach()  # the engine's own memory
        else:
            _write(parameter, held)

    @torch.no_grad()
    def checksum(self) -> str:
        """Return 16 hex digits over the bits of all weights. Another order of a parameter's values gives the same."""
        return _digest(parameter.detach() for parameter in self.model.parameters())


@torch.no_grad()
def weights_checksum(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], world: World) -> int:
    """Return a checksum over the fp32 weights of `Engine.state`, 63 bits, equal in every layout.

    `shapes` are those of the whole weights. No rank holds more than a few of them at once. All ranks must call it
    together.
    """
    return int(_digest(whole for _, whole in _whole_weights(state, shapes, world)), 16) >> 1


def _digest(weights: Iterable[Tensor]) -> str:
    sums = []
    for weight in weights:
        bits = torch.int32 if weight.element_size() == 4 else torch.int16
        sums.append(weight.contiguous().view(bits).sum(dtype=torch.int64))
    return xxhash.xxh3_64_hexdigest(torch.stack(sums).cpu().numpy().astype(np.int64).tobytes())


def _whole_weights(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], world: World
) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of `Engine.state`, whole and in fp32, as the ranks put it together from their pieces."""
    for bucket in _buckets(shapes):
        # the largest of equal values is that value, bit for bit, however many ranks hold it
        sizes = [math.prod(shapes[name]) for name in bucket]
        flat = torch.full((sum(sizes),), -torch.inf, dtype=torch.float32, device=world.device)
        parts = {name: part.view(shapes[name]) for name, part in zip(bucket, flat.split(sizes), strict=True)}
        for name in bucket:
            if (held := state.get(parameter_key(name))) is not None:
                _write(parts[name], held)
        world.all_reduce_max(flat)
        yield from parts.items()


def _buckets(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    bucket: list[str] = []
    size = 0
    for name, shape in shapes.items():
        count = math.prod(shape) * 4
        if bucket and size + count > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size += count
    if bucket:
        yield bucket


def _write(whole: Tensor, held: Tensor) -> None:
    """Write what a rank holds of a parameter to its place in the whole."""
    if not isinstance(held, Piece):
        whole.copy_(held)
        return
    for offsets, sizes, part in held.parts:
        place = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        whole[place].copy_(part)

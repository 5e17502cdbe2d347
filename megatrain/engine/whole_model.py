"""A whole model on one device with the weights of an engine, in any layout: to generate with, not to train.

Nothing goes through the disk. A single process shares the engine's memory where the number formats agree; otherwise the
ranks put the model together from their pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from megatrain.checkpoint.piece import Piece
from megatrain.config import TrainConfig
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
            model = GPT(config.model, choose_kernels(config, world.device))
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
                self._take_own(parameter, state[f"model.{name}"], shares)
            return
        for bucket in _buckets(parameters):
            # the largest of equal values is that value, bit for bit, however many ranks hold it
            sizes = [parameters[name].numel() for name in bucket]
            flat = torch.full((sum(sizes),), -torch.inf, dtype=torch.float32, device=self.world.device)
            parts = dict(zip(bucket, flat.split(sizes), strict=True))
            for name in bucket:
                if (held := state.get(f"model.{name}")) is not None:
                    _write(parts[name].view(parameters[name].shape), held)
            self.world.all_reduce_max(flat)
            for name in bucket:
                parameters[name].copy_(parts[name].view(parameters[name].shape))

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
        sums = []
        for parameter in self.model.parameters():
            bits = torch.int32 if parameter.element_size() == 4 else torch.int16
            sums.append(parameter.detach().contiguous().view(bits).sum(dtype=torch.int64))
        return xxhash.xxh3_64_hexdigest(torch.stack(sums).cpu().numpy().astype(np.int64).tobytes())


def _buckets(parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    bucket: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        if bucket and size + parameter.numel() * 4 > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size += parameter.numel() * 4
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

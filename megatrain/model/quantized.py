"""Weights of linear layers in 8 or 4 bits: torchao's weight-only quantisation, and how the values are stored.

A weight is `values x scale`: symmetric, with one scale a row (int8) or a group of inputs (int4). Activations stay in
floating point. torchao multiplies; on a CPU it keeps 4-bit values in a byte each while it computes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.errors import EnvironmentFault, how_to_install
from megatrain.kernels.choice import REFERENCE
from megatrain.model.gpt import GPT, Linear

KINDS = ("int8", "int4")
SCALE = "scale"
_INT4: Any = getattr(torch, "int4")  # noqa: B009, torch does not declare it


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a parameter is the weight of a linear layer inside a block. Embeddings and head stay dense."""
    return name.startswith("blocks.") and len(shape) == 2


@dataclass(frozen=True)
class Quantized:
    """A weight `[N, K]` as stored: int8 values `[N, K]`, or two 4-bit ones a byte, uint8 `[N, K / 2]`.

    `scale` is float32 `[N, 1]`, or `[N, K / group]`. Of a byte, the lower half is the earlier value; 8 is added
    to each.
    """

    kind: str
    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape `[N, K]`."""
        rows, columns = self.values.shape
        return rows, columns * (2 if self.kind == "int4" else 1)

    def unpacked(self) -> Tensor:
        """Return the values, int8 `[N, K]`."""
        if self.kind == "int8":
            return self.values
        halves = torch.stack((self.values & 15, self.values >> 4), dim=-1)
        return halves.flatten(1).to(torch.int8) - 8

    def dense(self) -> Tensor:
        """Return the weight that these values stand for, float32 `[N, K]`."""
        groups = self.unpacked().float().unflatten(1, (self.scale.shape[1], -1))
        dense: Tensor = (groups * self.scale.unsqueeze(-1)).flatten(1)
        return dense

    def tensor(self, device: torch.device) -> Tensor:
        """Return torchao's tensor of these values on `device`, with which a linear layer computes.

        Raises:
            EnvironmentFault: torchao is missing.
        """
        values, scale = self.unpacked().to(device), self.scale.to(device)
        group = self.shape[1] // scale.shape[1]
        if self.kind == "int8":
            made: Tensor = _torchao("Int8Tensor")(values, scale, [1, group], torch.float32)
            return made
        zero = torch.zeros_like(scale, dtype=torch.int8)
        made = _torchao("IntxUnpackedToInt8Tensor")(
            qdata=values,
            scale=scale,
            zero_point=zero,
            target_dtype=_INT4,
            block_size=(1, group),
            dtype=torch.float32,
            activation_quantization=None,
        )
        return made


def quantize(weight: Tensor, kind: str, group: int) -> Quantized:
    """Quantise a float32 weight `[N, K]` as torchao does: `int8` by rows, `int4` by groups of `group` inputs.

    `group` divides K, and is even.

    Raises:
        EnvironmentFault: torchao is missing.
    """
    if kind == "int8":
        per_row = _torchao("PerRow")()
        found = _torchao("Int8Tensor").from_hp(weight, granularity=per_row)
        return Quantized(kind, found.qdata, found.scale.float().reshape(len(weight), 1))
    found = _torchao("IntxUnpackedToInt8Tensor").from_hp(weight, (1, group), _INT4)
    values = (found.qdata + 8).to(torch.uint8).unflatten(1, (-1, 2))
    packed = values[..., 0] | (values[..., 1] << 4)
    return Quantized(kind, packed.contiguous(), found.scale.float().reshape(len(weight), -1))


def install(model: GPT, weights: Mapping[str, Quantized], device: torch.device) -> None:
    """Give the linear layers of a model their quantised weights, by parameter name. Raises EnvironmentFault."""
    for name, weight in weights.items():
        layer = linear_of(model, name)
        layer.weight = nn.Parameter(weight.tensor(device), requires_grad=False)
        layer.kernels = REFERENCE  # the others take dense tensors


def linear_of(model: GPT, name: str) -> Linear:
    """Return the linear layer that has the parameter `name`."""
    layer = model.get_submodule(name.removesuffix(".weight"))
    assert isinstance(layer, Linear), f"{name} is not a linear layer's"
    return layer


def _torchao(name: str) -> Any:
    """Return a class of torchao. Raises EnvironmentFault if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name_of_log in ("torchao", "torch.utils._pytree"):  # of extensions that are not used, of enums
                logging.getLogger(name_of_log).setLevel(logging.ERROR)
            from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    except ImportError as error:
        raise EnvironmentFault(f"int8 and int4 weights need torchao ({error}): {how_to_install('compress')}") from error
    return {"Int8Tensor": Int8Tensor, "IntxUnpackedToInt8Tensor": IntxUnpackedToInt8Tensor, "PerRow": PerRow}[name]

"""Which states an optimizer keeps for each parameter: their names, shapes and formats. Imports no torch.

Checkpoints, resharding, the memory estimate and both engines ask here, and take any set of slots per parameter. A new
optimizer adds its entry to `SLOTS`, and its constructor to `OPTIMIZERS` in `optimizers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megatrain.config import OptimConfig
from megatrain.model.formats import FORMAT_BYTES


@dataclass(frozen=True)
class Slot:
    """One state of one parameter, kept in checkpoints as `optim.<name>.<parameter>`.

    `shape` is that of the whole state: along each dimension the parameter's size, so that the state is cut as the
    parameter is, or 1, so that every shard holds it. `dtype` is a config's name of a format (`fp32`, `bf16`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "fp32"

    def block(
        self, shape: tuple[int, ...], origin: tuple[int, ...], sizes: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return origin and sizes of the block of this state that belongs to a block of the parameter of `shape`."""
        dims = list(zip(self.shape, shape, origin, sizes, strict=True))
        return (
            tuple(start if own == whole else 0 for own, whole, start, _ in dims),
            tuple(size if own == whole else own for own, whole, _, size in dims),
        )


SlotRule = Callable[[OptimConfig, str, tuple[int, ...]], tuple[Slot, ...]]


def adamw_slots(config: OptimConfig, parameter: str, shape: tuple[int, ...]) -> tuple[Slot, ...]:
    """Return AdamW's two moments, of the parameter's shape, under torch's names."""
    return Slot("exp_avg", shape, config.moments), Slot("exp_avg_sq", shape, config.moments)


SLOTS: dict[str, SlotRule] = {"adamw": adamw_slots}
"""The slots of each optimizer, by `optim.name`."""


def slots_of(config: OptimConfig, parameter: str, shape: tuple[int, ...]) -> tuple[Slot, ...]:
    """Return the states that `optim.name` keeps for a parameter of this (whole) shape."""
    return SLOTS[config.name](config, parameter, shape)


def slot_bytes(config: OptimConfig, parameter: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of those states per element of a parameter, without reduced states, which are small."""
    return sum(FORMAT_BYTES[slot.dtype] for slot in slots_of(config, parameter, shape) if slot.shape == shape)


def slot_names(config: OptimConfig, shapes: Mapping[str, tuple[int, ...]], parameters: Iterable[str]) -> list[str]:
    """Return the names of all slots that any of these parameters has, in order and once."""
    return list(dict.fromkeys(slot.name for p in parameters for slot in slots_of(config, p, shapes[p])))


def decays(num_dims: int) -> bool:
    """Whether weight decay applies to a parameter of this many dimensions: to matrices, not to biases and norms."""
    return num_dims >= 2

"""The states that an optimizer keeps for each parameter: their names, shapes and formats. Imports no torch.

Checkpoints, resharding, the memory estimate and both engines use this module, and support any set of slots per
parameter. A new optimizer adds an entry to `SLOTS`, and its constructor to `OPTIMIZERS` in `optimizers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megatrain.config import OptimConfig
from megatrain.model.formats import FORMAT_BYTES


@dataclass(frozen=True)
class Slot:
    """One state of one parameter, stored in checkpoints as `optim.<name>.<parameter>`.

    `shape` is the shape of the whole state. Each dimension has either the parameter's size and is sharded with it, or
    size 1 and is held by every shard. `dtype` is the name of a format in the config (`fp32`, `bf16`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "fp32"

    def block(
        self, shape: tuple[int, ...], origin: tuple[int, ...], sizes: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the origin and sizes of this state's block that belongs to a block of the parameter of `shape`."""
        dims = list(zip(self.shape, shape, origin, sizes, strict=True))
        return (
            tuple(start if own == whole else 0 for own, whole, start, _ in dims),
            tuple(size if own == whole else own for own, whole, _, size in dims),
        )


SlotRule = Callable[[OptimConfig, str, tuple[int, ...]], tuple[Slot, ...]]


def adamw_slots(config: OptimConfig, parameter: str, shape: tuple[int, ...]) -> tuple[Slot, ...]:
    """Return AdamW's two moments, with the parameter's shape and torch's names."""
    return Slot("exp_avg", shape, config.moments), Slot("exp_avg_sq", shape, config.moments)


SLOTS: dict[str, SlotRule] = {"adamw": adamw_slots}
"""The slots of each optimizer, by `optim.name`."""


def slots_of(config: OptimConfig, parameter: str, shape: tuple[int, ...]) -> tuple[Slot, ...]:
    """Return the states that `optim.name` keeps for a parameter of this whole shape."""
    return SLOTS[config.name](config, parameter, shape)


def slot_bytes(config: OptimConfig, parameter: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a parameter's states per element. States with reduced shapes are small and not counted."""
    return sum(FORMAT_BYTES[slot.dtype] for slot in slots_of(config, parameter, shape) if slot.shape == shape)


def slot_names(config: OptimConfig, shapes: Mapping[str, tuple[int, ...]], parameters: Iterable[str]) -> list[str]:
    """Return the names of all slots of these parameters, in order, without duplicates."""
    return list(dict.fromkeys(slot.name for p in parameters for slot in slots_of(config, p, shapes[p])))


def decays(num_dims: int) -> bool:
    """Whether weight decay applies to a parameter with `num_dims` dimensions: to matrices, not to biases and norms."""
    return num_dims >= 2

"""The tensor-parallel plan as data: over which axes of ranks each parameter is cut, and in which dimension.

tensor.py translates it into DTensor styles (native engine), autotp.py into DeepSpeed's layers. `block` gives a rank's
part of a parameter; ZeRO then shards these blocks. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple


class Cut(NamedTuple):
    """How a parameter is cut: the kind of layer, and (axis of ranks, dimension) pairs, the outermost cut first."""

    kind: str
    dimensions: tuple[tuple[str, int], ...] = ()


COLUMN = Cut("column", (("tp", 0),))
"""Cut along a layer's outputs (query, key and value: by heads)."""

ROW = Cut("row", (("tp", 1),))
"""Cut along a layer's inputs."""

VOCAB = Cut("vocab", (("tp", 0),))
"""Cut along the rows of a vocabulary table."""

REPLICATED = Cut("replicated")
"""Whole on every rank: norms, positions, biases of row-cut layers."""

HEADWISE = Cut("headwise")
"""Whole on every rank, but applied to each rank's own heads, so that the gradient is a sum over ranks."""

Rules = tuple[tuple[str, Cut], ...]

PLAN: Rules = (
    ("embed.weight", VOCAB),
    ("head.weight", VOCAB),
    ("blocks.*.attn.[qkv].lora_a", REPLICATED),
    ("blocks.*.attn.o.lora_a", ROW),
    ("blocks.*.mlp.gate.lora_a", REPLICATED),
    ("blocks.*.mlp.up.lora_a", REPLICATED),
    ("blocks.*.mlp.down.lora_a", ROW),
    ("blocks.*.attn.[qkv].*", COLUMN),
    ("blocks.*.attn.[qk]_norm.weight", HEADWISE),
    ("blocks.*.attn.o.weight", ROW),
    ("blocks.*.mlp.gate.*", COLUMN),
    ("blocks.*.mlp.up.*", COLUMN),
    ("blocks.*.mlp.down.weight", ROW),
    ("*", REPLICATED),
)
"""Parameter patterns and their cuts. The first match wins."""


class Share(NamedTuple):
    """A rank's part of anything cut over an axis: part `rank` of `size`."""

    axis: str
    size: int
    rank: int


def cut(name: str, rules: Rules = PLAN) -> Cut:
    """Return how the parameter of this single-device name is cut."""
    return next(kind for pattern, kind in rules if fnmatchcase(name, pattern))


def cut_dimension(name: str, axis: str = "tp", rules: Rules = PLAN) -> int | None:
    """Return the dimension in which a parameter is cut over an axis of ranks, or None if it is whole on each."""
    return dict(cut(name, rules).dimensions).get(axis)


def is_summed(name: str) -> bool:
    """Return whether a parameter is whole on every tensor rank, but its gradient must be summed over them.

    This holds where each rank applies the parameter to its own slice of the sequence or its own heads. Biases of
    row-cut layers are added to the whole sequence, so their gradients need no sum; those of low-rank layers are summed
    as they are computed.
    """
    layer, _, kind = name.rpartition(".")
    if kind in ("lora_a", "lora_b"):
        return False
    return cut_dimension(name) is None and not (kind == "bias" and cut(f"{layer}.weight") == ROW)


def shares(sizes: Mapping[str, int], place: Mapping[str, int], rules: Rules = PLAN) -> tuple[Share, ...]:
    """Return a rank's share on each axis that the plan cuts over, given all axes' sizes and the rank's coordinate."""
    return tuple(Share(axis, sizes[axis], place[axis]) for axis in _axes(rules))


@lru_cache
def _axes(rules: Rules) -> tuple[str, ...]:
    return tuple(dict.fromkeys(axis for _, kind in rules for axis, _ in kind.dimensions))


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return start and length of chunk `index` of `size`, as `torch.chunk` cuts: the last are shorter, or empty."""
    length = -(-size // parts)
    start = min(index * length, size)
    return start, min(start + length, size) - start


def block(
    name: str, shape: tuple[int, ...], shares: Iterable[Share], rules: Rules = PLAN
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return origin and shape of a rank's block of a parameter, given its global `shape` and the rank's shares."""
    origin, sizes = [0] * len(shape), list(shape)
    by_axis = {share.axis: share for share in shares}
    for axis, dimension in cut(name, rules).dimensions:
        share = by_axis[axis]
        start, sizes[dimension] = chunk(sizes[dimension], share.size, share.rank)
        origin[dimension] += start
    return tuple(origin), tuple(sizes)

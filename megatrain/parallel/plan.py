"""The tensor-parallel plan as data: how each parameter is cut over the ranks of a tensor group. Imports no torch.

Declared once; `tensor.py` translates it into DTensor styles (native engine) and `autotp.py` into DeepSpeed's layers, and an
engine takes from it where in the whole parameter a rank's block stands.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

COLUMN, ROW, VOCAB, REPLICATED, HEADWISE = "column", "row", "vocab", "replicated", "headwise"

PLAN = (
    ("embed.weight", VOCAB),
    ("head.weight", VOCAB),
    ("blocks.*.attn.[qkv].*", COLUMN),
    ("blocks.*.attn.[qk]_norm.weight", HEADWISE),
    ("blocks.*.attn.o.weight", ROW),
    ("blocks.*.mlp.gate.*", COLUMN),
    ("blocks.*.mlp.up.*", COLUMN),
    ("blocks.*.mlp.down.weight", ROW),
    ("*", REPLICATED),
)
"""Parameter pattern to cut, the first that matches. `column` cuts a layer's outputs (query, key and value by heads),
`row` its inputs, `vocab` the rows of a vocabulary table; what is `replicated` (norms, positions, biases of row-cut
layers) is whole on every rank. So is what is `headwise`, but it acts on heads that are cut: each rank's gradient is a
part of the sum."""

_DIMENSION = {COLUMN: 0, VOCAB: 0, ROW: 1, REPLICATED: None, HEADWISE: None}


def cut(name: str) -> str:
    """How the parameter of this single-device name is cut."""
    return next(kind for pattern, kind in PLAN if fnmatchcase(name, pattern))


def cut_dimension(name: str) -> int | None:
    """The dimension that is cut, None where the parameter is whole on every rank."""
    return _DIMENSION[cut(name)]


def is_summed(name: str) -> bool:
    """Whether a parameter is whole on each tensor rank but meets only that rank's slice of the sequence (or its heads), so
    that its gradient is the sum of theirs. Biases of row-cut layers are added where the whole sequence is at hand."""
    layer, _, kind = name.rpartition(".")
    return cut_dimension(name) is None and not (kind == "bias" and cut(f"{layer}.weight") == ROW)


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of chunk `index` when `size` is cut as `torch.chunk` cuts it: the last ones are shorter, or empty."""
    length = -(-size // parts)
    start = min(index * length, size)
    return start, min(start + length, size) - start


def block(name: str, shape: tuple[int, ...], tp: int, tp_rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Origin and shape of the block of a parameter (of global `shape`) that one rank of a tensor group works with."""
    dimension = cut_dimension(name)
    origin, sizes = [0] * len(shape), list(shape)
    if dimension is not None and tp > 1:
        origin[dimension], sizes[dimension] = chunk(shape[dimension], tp, tp_rank)
    return tuple(origin), tuple(sizes)

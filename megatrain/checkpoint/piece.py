"""A rank's flat piece of a parameter, with global coordinates.

ZeRO cuts a parameter at arbitrary flat positions, but torch's distributed checkpoint expects rectangles. A flat range
of a row-major block consists of a few rectangles. A tensor subclass passes them to torch's planner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Rectangle = tuple[tuple[int, ...], tuple[int, ...], int]
"""Global offsets, sizes, and the index of the rectangle's first element in the flat piece."""


def rectangles(start: int, stop: int, shape: Sequence[int], origin: Sequence[int] | None = None) -> list[Rectangle]:
    """Cut the flat range [start, stop) of a row-major block of `shape` at `origin` into rectangles.

    Returns at most `2 * len(shape) - 1` rectangles, in the order of the range.
    """
    corner = tuple(origin) if origin is not None else (0,) * len(shape)
    if start >= stop:
        return []
    if not shape:
        return [((), (), 0)]
    if len(shape) == 1:
        return [((corner[0] + start,), (stop - start,), 0)]
    row = math.prod(shape[1:])
    first_whole, last_whole = -(-start // row), stop // row

    def within(index: int, low: int, high: int, at: int) -> list[Rectangle]:
        inner = rectangles(low, high, shape[1:], corner[1:])
        return [((corner[0] + index, *offsets), (1, *sizes), at + begin) for offsets, sizes, begin in inner]

    if first_whole > last_whole:  # the range lies inside one row
        return within(last_whole, start - last_whole * row, stop - last_whole * row, 0)
    cut: list[Rectangle] = []
    if start < first_whole * row:
        cut += within(first_whole - 1, start - (first_whole - 1) * row, row, 0)
    if last_whole > first_whole:
        offsets = (corner[0] + first_whole, *corner[1:])
        cut.append((offsets, (last_whole - first_whole, *shape[1:]), first_whole * row - start))
    if stop > last_whole * row:
        cut += within(last_whole, 0, stop - last_whole * row, last_whole * row - start)
    return cut


class Piece(torch.Tensor):
    """Elements [start, start + len(flat)) of a row-major block of a tensor. `flat` aliases the owner's memory.

    The block has the shape `block` and starts at `origin` in the tensor of `global_shape`; by default it is the whole
    tensor. The class implements torch's `_Checkpointable` protocol. It must be a tensor subclass: a plain object
    fails on save and is dropped on load.
    """

    flat: Tensor
    start: int
    parts: list[tuple[torch.Size, torch.Size, Tensor]]

    @staticmethod
    def __new__(
        cls,
        flat: Tensor,
        start: int,
        global_shape: Sequence[int],
        origin: Sequence[int] | None = None,
        block: Sequence[int] | None = None,
    ) -> Piece:
        """Wrap `flat`, a contiguous 1-D tensor, without copying it."""
        assert flat.dim() == 1 and flat.is_contiguous()
        piece: Piece = torch.Tensor._make_wrapper_subclass(
            cls, tuple(global_shape), dtype=flat.dtype, device=flat.device
        )
        piece.flat, piece.start = flat.detach(), start
        piece.parts = [
            (torch.Size(offsets), torch.Size(sizes), piece.flat[at : at + math.prod(sizes)].view(sizes))
            for offsets, sizes, at in rectangles(
                start, start + flat.numel(), tuple(global_shape if block is None else block), origin
            )
        ]
        return piece

    def over(self, flat: Tensor) -> Piece:
        """Return the same piece backed by `flat`, which must be contiguous and of the same length."""
        assert flat.shape == self.flat.shape and flat.is_contiguous()
        other: Piece = torch.Tensor._make_wrapper_subclass(
            type(self), tuple(self.shape), dtype=flat.dtype, device=flat.device
        )
        other.flat, other.start, other.parts, at = flat, self.start, [], 0
        for offsets, sizes, part in self.parts:  # the parts are consecutive in the flat piece
            other.parts.append((offsets, sizes, flat[at : at + part.numel()].view(sizes)))
            at += part.numel()
        return other

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Allow only `detach`: any other operator would need elements that this rank does not hold."""
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"a Piece does not support {func}; use its .flat")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """Return the rectangles that this rank holds (torch's protocol)."""
        return [ChunkStorageMetadata(offsets, sizes) for offsets, sizes, _ in self.parts]

    def __create_write_items__(self, fqn: str, _obj: Any) -> list[WriteItem]:
        """Return one write item per rectangle (torch's protocol)."""
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, sizes),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.size(),
                ),
            )
            for offsets, sizes, _ in self.parts
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Return the rectangle at `index` (torch's protocol)."""
        return next(part for offsets, _, part in self.parts if offsets == index.offset)

"""Named axes of ranks: rank to coordinate and back, and which ranks form a group. Imports no torch.

Nothing here knows what an axis means; layout.py declares the axes of a job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Grid:
    """Ranks laid out along named axes, outermost first: neighbouring ranks differ along the last axis."""

    sizes: Mapping[str, int]

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return a rank's index on each axis."""
        place = dict.fromkeys(self.sizes, 0)
        for axis in reversed(place):
            rank, place[axis] = divmod(rank, self.sizes[axis])
        return place

    def rank(self, place: Mapping[str, int]) -> int:
        """Return the rank at a coordinate, the inverse of `coordinate`."""
        rank = 0
        for axis, size in self.sizes.items():
            rank = rank * size + place[axis]
        return rank

    def group(self, rank: int, axis: str) -> tuple[int, ...]:
        """Return the ranks that differ from `rank` along one axis only, itself among them, in rank order."""
        place = self.coordinate(rank)
        return tuple(self.rank({**place, axis: index}) for index in range(self.sizes[axis]))

    def regrouped(self, axes: tuple[str, ...], sizes: Mapping[str, int]) -> Grid:
        """Return the same ranks with the adjacent `axes` replaced by those of `sizes`, whose product is the same."""
        names = list(self.sizes)
        start = names.index(axes[0])
        stop = start + len(axes)
        assert tuple(names[start:stop]) == axes, f"{axes} are not neighbours in {names}"
        assert prod(sizes.values()) == prod(self.sizes[axis] for axis in axes), (sizes, self.sizes)
        before, after = names[:start], names[stop:]
        return Grid(
            {**{axis: self.sizes[axis] for axis in before}, **sizes, **{axis: self.sizes[axis] for axis in after}}
        )

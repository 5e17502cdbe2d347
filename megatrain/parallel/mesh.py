"""A layout's axes as torch device meshes, and the process groups of its collectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatrain.parallel.grid import Grid
from megatrain.parallel.layout import Layout


@dataclass(frozen=True)
class Groups:
    """This rank's process group on each axis, None on an axis of size 1.

    `mesh` has the axes of `Layout.sharding_grid`: pp, replicate, shard, tp.
    """

    mesh: DeviceMesh
    pp: dist.ProcessGroup | None
    cp: dist.ProcessGroup | None
    tp: dist.ProcessGroup | None
    ends: dist.ProcessGroup | None  # the ranks with the first and the last pipeline stage

    @property
    def tensor_mesh(self) -> DeviceMesh:
        """The tensor group as a one-dimensional mesh."""
        return self.mesh["tp"]


def make_groups(layout: Layout, rank: int, device: torch.device) -> Groups:
    """Make the process groups of a layout. Collective over all ranks."""
    mesh = _device_mesh(layout.sharding_grid, device)
    return Groups(
        mesh=mesh,
        pp=mesh["pp"].get_group() if layout.pp > 1 else None,
        cp=_device_mesh(layout.grid, device)["cp"].get_group() if layout.cp > 1 else None,
        tp=mesh["tp"].get_group() if layout.tp > 1 else None,
        ends=_ends(layout, rank),
    )


def _device_mesh(grid: Grid, device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, tuple(grid.sizes.values()), mesh_dim_names=tuple(grid.sizes))


def _ends(layout: Layout, rank: int) -> dist.ProcessGroup | None:
    """Make a group for each pair of ranks with the first and the last stage; return this rank's, or None."""
    first, last = layout.pp_rank_of(0), layout.pp_rank_of(layout.num_stages - 1)
    if first == last:
        return None
    own_group = None
    for inner in range(layout.world_size // layout.pp):  # the ranks at pipeline coordinate 0
        place = layout.coordinate(inner)
        pair = [layout.rank(place._replace(pp=pp)) for pp in (first, last)]
        group = dist.new_group(pair)  # collective: every rank makes every group
        if rank in pair:
            own_group = group
    return own_group

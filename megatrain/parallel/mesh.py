"""A layout's axes as torch device meshes: who reduces, gathers and exchanges with whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megatrain.parallel.layout import Coordinate, Layout


@dataclass(frozen=True)
class Groups:
    """This rank's neighbours on each axis. An axis of degree 1 has no group (None).

    `mesh` has the dimensions pp, replicate, shard, tp: data and context ranks hold the same parameters, so that sharding
    runs over both of them at once.
    """

    mesh: DeviceMesh
    pp: dist.ProcessGroup | None
    cp: dist.ProcessGroup | None
    tp: dist.ProcessGroup | None
    ends: dist.ProcessGroup | None  # the first and the last pipeline stage, where they are on two ranks

    @property
    def tensor_mesh(self) -> DeviceMesh:
        """The tensor group as a one-dimensional mesh."""
        return self.mesh["tp"]


def make_groups(layout: Layout, rank: int, device: torch.device) -> Groups:
    """The process groups of a layout. Every rank of the job must call it."""
    replicas = layout.dp * layout.cp // layout.shards if layout.zero else layout.dp * layout.cp
    shape = (layout.pp, replicas, layout.dp * layout.cp // replicas, layout.tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "replicate", "shard", "tp"))
    context = None
    if layout.cp > 1:
        axes = (layout.pp, layout.dp, layout.cp, layout.tp)
        context = init_device_mesh(device.type, axes, mesh_dim_names=("pp", "dp", "cp", "tp"))["cp"].get_group()
    return Groups(
        mesh=mesh,
        pp=mesh["pp"].get_group() if layout.pp > 1 else None,
        cp=context,
        tp=mesh["tp"].get_group() if layout.tp > 1 else None,
        ends=_ends(layout, rank),
    )


def _ends(layout: Layout, rank: int) -> dist.ProcessGroup | None:
    """The group of this rank and the one that holds the other end of the model, if this rank holds exactly one end."""
    first = next(pp for pp in range(layout.pp) if 0 in layout.stages_of(pp))
    last = next(pp for pp in range(layout.pp) if layout.num_stages - 1 in layout.stages_of(pp))
    if first == last:
        return None
    mine = None
    for inner in range(layout.world_size // layout.pp):
        place = layout.coordinate(inner)
        pair = [layout.rank(Coordinate(pp, *place[1:])) for pp in (first, last)]
        group = dist.new_group(pair)  # collective: every rank makes every pair
        if rank in pair:
            mine = group
    return mine

"""Axes of ranks and the blocks cut along them: today's numbers, and those of a layout with one more axis."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from support.ranks import run_ranks

from megatrain.config import TrainConfig
from megatrain.model.count import parameter_shapes
from megatrain.parallel import plan
from megatrain.parallel.grid import Grid
from megatrain.parallel.layout import Layout, num_micro_batches
from megatrain.parallel.mesh import make_groups


class WiderCoordinate(NamedTuple):
    pp: int = 0
    ep: int = 0
    dp: int = 0
    cp: int = 0
    tp: int = 0


@dataclass(frozen=True)
class WiderLayout(Layout):
    """A layout with one more axis, between the pipeline and data parallelism."""

    coordinate_type: ClassVar = WiderCoordinate
    ep: int = 1


EXPERT = plan.Cut("expert", (("ep", 0), ("tp", 1)))
WIDER_PLAN = (("blocks.*.mlp.experts.up", EXPERT), *plan.PLAN)


def sizes(**changes):
    plain = dict(world_size=1, dp=1, cp=1, tp=1, pp=1, zero=3, dp_replicate=1, schedule="1f1b", virtual_stages=1)
    return {**plain, "cp_kind": "ulysses", "engine": "native", "precision": "fp32", **changes}


def wider(**degrees):
    return WiderLayout(**sizes(world_size=prod(degrees.values()), **degrees))


@pytest.mark.parametrize(("pp", "dp", "cp", "tp"), [(1, 1, 1, 1), (2, 3, 2, 2), (3, 1, 2, 4), (1, 4, 1, 2)])
def test_ranks_are_numbered_with_tensor_ranks_innermost(pp, dp, cp, tp):
    layout = Layout(**sizes(world_size=pp * dp * cp * tp, pp=pp, dp=dp, cp=cp, tp=tp))
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        assert tuple(place) == (rank // (dp * cp * tp), rank // (cp * tp) % dp, rank // tp % cp, rank % tp)
        assert layout.rank(place) == rank == ((place.pp * dp + place.dp) * cp + place.cp) * tp + place.tp
        assert layout.dp_rank(rank) == place.dp and layout.dp_cp_rank(rank) == place.dp * cp + place.cp


@pytest.mark.parametrize(("zero", "replicas"), [(0, 1), (1, 1), (3, 2)])
def test_shards_run_over_data_and_context_ranks(zero, replicas):
    layout = Layout(**sizes(world_size=16, pp=1, dp=4, cp=2, tp=2, zero=zero, dp_replicate=replicas))
    shards = 8 // replicas if zero else 1
    assert layout.sharding_grid.sizes == {"pp": 1, "replicate": 8 // shards, "shard": shards, "tp": 2}
    for rank in range(16):
        place = layout.sharding_grid.coordinate(rank)
        assert (place["replicate"], place["shard"]) == divmod(layout.dp_cp_rank(rank), shards)


def test_one_more_axis_gets_coordinates_and_groups():
    layout = wider(pp=2, ep=3, dp=2, cp=2, tp=2)
    places = [layout.coordinate(rank) for rank in range(48)]
    assert places == [WiderCoordinate(*place) for place in product(range(2), range(3), range(2), range(2), range(2))]
    assert [layout.rank(place) for place in places] == list(range(48))
    assert layout.grid.group(9, "ep") == (1, 9, 17) and layout.grid.group(9, "tp") == (8, 9)
    assert list(layout.sharding_grid.sizes.items()) == [("pp", 2), ("ep", 3), ("replicate", 1), ("shard", 4), ("tp", 2)]
    for axis in layout.grid.sizes:  # the groups of an axis are a partition of the ranks
        groups = {layout.grid.group(rank, axis) for rank in range(48)}
        assert sorted(rank for group in groups for rank in group) == list(range(48))


def test_neighbouring_axes_alone_can_be_regrouped():
    grid = Grid({"a": 2, "b": 3, "c": 4})
    assert grid.regrouped(("b", "c"), {"d": 6, "e": 2}).sizes == {"a": 2, "d": 6, "e": 2}
    with pytest.raises(AssertionError):
        grid.regrouped(("a", "c"), {"d": 8})
    with pytest.raises(AssertionError):
        grid.regrouped(("b", "c"), {"d": 5})


def group_of_the_new_axis(world):
    layout = wider(pp=1, ep=2, dp=1, cp=1, tp=1)
    groups = make_groups(layout, world.rank, torch.device("cpu"))
    return torch.distributed.get_process_group_ranks(groups.mesh["ep"].get_group()), groups.tp


def test_one_more_axis_gets_process_groups():
    assert run_ranks(group_of_the_new_axis, 2) == [([0, 1], None)] * 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.0.mlp.experts.up", (5, 7, 2)),
        ("blocks.0.mlp.up.weight", (7, 3)),
        ("blocks.0.mlp.down.weight", (3, 7)),
        ("blocks.0.norm.weight", (5,)),
    ],
)
def test_each_element_belongs_to_one_rank_of_a_replica(name, shape):
    """Along the axes that cut a parameter its blocks are a partition; along the others they are copies."""
    layout = wider(pp=1, ep=2, dp=2, cp=1, tp=3)
    owners = np.zeros(shape, int)
    for rank in range(layout.world_size):
        place = layout.coordinate(rank)
        shares = plan.shares(layout.grid.sizes, place._asdict(), WIDER_PLAN)
        assert shares == (plan.Share("ep", 2, place.ep), plan.Share("tp", 3, place.tp))
        origin, block = plan.block(name, shape, shares, WIDER_PLAN)
        owners[tuple(slice(start, start + length) for start, length in zip(origin, block, strict=True))] += 1
    cuts = [axis for axis, _ in plan.cut(name, WIDER_PLAN).dimensions]
    copies = prod(size for axis, size in layout.grid.sizes.items() if axis not in cuts)
    assert (owners == copies).all()


def test_todays_blocks_are_cut_over_tensor_ranks_alone():
    """The formula that the plan had when it knew one axis."""
    config = TrainConfig().model
    config.num_layers, config.num_heads, config.hidden_size, config.vocab_size = 1, 8, 64, 1001
    for (name, shape), tp in product(parameter_shapes(config).items(), (1, 2, 4)):
        for rank in range(tp):
            origin, block = [0] * len(shape), list(shape)
            dimension = plan.cut_dimension(name)
            if dimension is not None:
                origin[dimension], block[dimension] = plan.chunk(shape[dimension], tp, rank)
            assert plan.block(name, shape, [plan.Share("tp", tp, rank)]) == (tuple(origin), tuple(block))


def test_chunks_are_those_of_torch():
    for size, parts in product((1, 5, 8), (1, 2, 3, 4)):
        lengths = [len(part) for part in torch.arange(size).chunk(parts)]
        assert [plan.chunk(size, parts, index)[1] for index in range(parts)][: len(lengths)] == lengths
        assert sum(plan.chunk(size, parts, index)[1] for index in range(parts)) == size


def test_gradients_of_what_tensor_ranks_hold_whole_are_summed():
    """Biases of row-cut layers see the whole sequence: theirs are not."""
    assert plan.is_summed("blocks.0.norm.weight") and plan.is_summed("blocks.0.attn.q_norm.weight")
    assert not plan.is_summed("blocks.0.mlp.down.bias") and not plan.is_summed("blocks.0.mlp.up.weight")


def test_micro_batches_of_each_size_of_the_ramp():
    layout, loop = Layout(**sizes(world_size=2, dp=2)), TrainConfig().train
    loop.global_batch_size, loop.micro_batch_size = 32, 2
    assert layout.micro_batches(loop) == [num_micro_batches(32, 2, 2)] == [8]
    loop.batch_ramp_start, loop.batch_ramp_increment, loop.batch_ramp_steps = 8, 8, 10
    assert layout.micro_batches(loop) == [2, 4, 6, 8]

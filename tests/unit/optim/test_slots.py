"""Slots: which states an optimizer keeps for a parameter, and which block of them a shard holds."""

from __future__ import annotations

import pytest
import torch

from megatrain.config import OptimConfig
from megatrain.optim.optimizers import create_slots
from megatrain.optim.slots import SLOTS, Slot, decays, slot_bytes, slot_names, slots_of


def test_a_state_of_the_parameters_shape_is_cut_as_the_parameter_is():
    assert Slot("moment", (8, 6)).block((8, 6), (4, 3), (2, 3)) == ((4, 3), (2, 3))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((8, 1), ((4, 0), (2, 1))), ((1, 6), ((0, 3), (1, 3))), ((1, 1), ((0, 0), (1, 1)))],
)
def test_every_shard_holds_the_whole_of_a_reduced_dimension(shape, expected):
    assert Slot("factor", shape).block((8, 6), (4, 3), (2, 3)) == expected


def test_blocks_of_disjoint_shards_fill_the_state():
    """Four shards hold each element of a full state once, and each of a row factor once per column shard."""
    counts = {shape: torch.zeros(shape) for shape in ((8, 6), (8, 1))}
    for row in (0, 4):
        for column in (0, 3):
            for shape, count in counts.items():
                origin, sizes = Slot("state", shape).block((8, 6), (row, column), (4, 3))
                count[tuple(slice(o, o + s) for o, s in zip(origin, sizes, strict=True))] += 1
    assert counts[8, 6].eq(1).all() and counts[8, 1].eq(2).all()


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_adamw_keeps_two_moments_of_the_parameters_shape(moments):
    config = OptimConfig(moments=moments)
    slots = slots_of(config, "a.weight", (3, 2))
    assert slots == (Slot("exp_avg", (3, 2), moments), Slot("exp_avg_sq", (3, 2), moments))
    assert slot_bytes(config, "a.weight", (3, 2)) == {"fp32": 8, "bf16": 4}[moments]


def factored(config, parameter, shape):
    """Return a momentum for each matrix, and a row factor beside it; a vector has one state of its own."""
    if len(shape) == 2:
        return Slot("momentum", shape, "bf16"), Slot("rows", (shape[0], 1))
    return (Slot("vector", shape),)


def test_bytes_leave_out_reduced_states(monkeypatch):
    monkeypatch.setitem(SLOTS, "adamw", factored)
    assert slot_bytes(OptimConfig(), "a.weight", (3, 2)) == 2
    assert slot_bytes(OptimConfig(), "a.bias", (3,)) == 4


def test_names_come_once_and_in_order(monkeypatch):
    monkeypatch.setitem(SLOTS, "adamw", factored)
    shapes = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (2, 2)}
    assert slot_names(OptimConfig(), shapes, shapes) == ["momentum", "rows", "vector"]
    assert slot_names(OptimConfig(), shapes, ["a.bias"]) == ["vector"]


def test_created_states_are_zero_and_existing_ones_stay():
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    slots = [(Slot("momentum", (6, 2), "bf16"), (3, 2)), (Slot("rows", (6, 1)), (3, 1))]
    create_slots(optimizer, [(parameter, slots)], step=4)
    state = optimizer.state[parameter]
    assert [(state[name].shape, state[name].dtype) for name in ("momentum", "rows")] == [
        (torch.Size([3, 2]), torch.bfloat16),
        (torch.Size([3, 1]), torch.float32),
    ]
    assert not state["momentum"].any() and not state["rows"].any() and state["step"].item() == 4
    state["rows"].fill_(7)
    create_slots(optimizer, [(parameter, slots)], step=5)
    assert state["rows"].eq(7).all() and state["step"].item() == 5


def test_weight_decay_is_for_matrices():
    assert [decays(num_dims) for num_dims in (0, 1, 2, 3)] == [False, False, True, True]

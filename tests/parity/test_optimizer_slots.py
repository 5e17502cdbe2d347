"""Any set of optimizer states per parameter is created, saved, resharded and loaded by both engines, and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs import gather, layout_job, train
from support.ranks import run_ranks
from support.records import at

from megatrain.checkpoint.store import CheckpointStore, load_into, verify
from megatrain.config import OptimConfig
from megatrain.engine.build import build_engine
from megatrain.optim import optimizers, slots
from megatrain.optim.slots import Slot, slot_bytes
from megatrain.parallel.layout import Layout
from megatrain.planner.memory import MemoryModel

LAYOUTS = {
    "native, 1": (1, {}),
    "native, ZeRO-3 on 2": (2, {"zero": 3}),
    "native, tensor 2": (2, {"tp": 2}),
    "native, pipeline 2": (2, {"pp": 2}),
    "deepspeed, ZeRO-0 on 2": (2, {"engine": "deepspeed"}),
    "deepspeed, ZeRO-1 on 2": (2, {"engine": "deepspeed", "zero": 1}),
    "deepspeed, ZeRO-3 on 2": (2, {"engine": "deepspeed", "zero": 3}),
}


class Momentum(torch.optim.Optimizer):
    """SGD with momentum. Matrices also have a mean squared gradient and optionally a count by row."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.9), "eps": 0.0, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                gradient = parameter.grad / getattr(self, "grad_scale", 1.0)
                state["momentum"].mul_(0.9).add_(gradient)
                if "mean_square" in state:
                    state["mean_square"].mul_(0.9).add_((0.1 * gradient**2).to(state["mean_square"].dtype))
                if "row_count" in state:
                    state["row_count"] += 1
                state["step"] += 1
                parameter.add_(state["momentum"], alpha=-group["lr"])


def elementwise(config, name, shape):
    momentum, square = Slot("momentum", shape), Slot("mean_square", shape)
    return (momentum, square) if len(shape) >= 2 else (momentum,)


def reduced(config, name, shape):
    """Return slots with the mean square in bf16 and a state of one column."""
    if len(shape) < 2:
        return (Slot("momentum", shape),)
    return Slot("momentum", shape), Slot("mean_square", shape, "bf16"), Slot("row_count", (shape[0], 1))


def job(rule, **changes):
    config = layout_job(micro=2, **changes)
    config.optim.name = "momentum"
    slots.SLOTS["momentum"] = {"elementwise": elementwise, "reduced": reduced}[rule]
    optimizers.OPTIMIZERS["momentum"] = lambda groups, optim, seed, places: Momentum(groups, optim.lr)
    return config


def save(world, rule, changes, folder):
    """Run two steps, save, run two more; return the gathered state at the save and the losses after it."""
    config = job(rule, **changes)
    engine, layout = build_engine(config, world), Layout.of(config, world.size)
    place = layout.dp_rank(world.rank), layout.dp
    train(engine, config, *place, 1, 2)
    CheckpointStore(Path(folder) / "checkpoints", world).save(engine.state(), at(2, engine.counters()))
    whole = gather(engine, Path(folder) / "gathered", world)
    return whole, train(engine, config, *place, 3, 4)


def load(world, rule, changes, folder, scratch):
    config = job(rule, **changes)
    engine, layout = build_engine(config, world), Layout.of(config, world.size)
    checkpoint = Path(folder) / "checkpoints" / "step_00000002"
    manifest = verify(checkpoint, world)
    load_into(checkpoint, manifest, engine.state(), world)
    engine.restore(manifest.counters)
    whole = gather(engine, Path(scratch), world)
    return whole, train(engine, config, layout.dp_rank(world.rank), layout.dp, 3, 4)


def check(rule, saved, loaded, tmp_path):
    """Check that the gathered state is bit-equal with exactly each parameter's slots, and that the losses continue."""
    (ranks, changes), (other_ranks, others) = LAYOUTS[saved], LAYOUTS[loaded]
    whole, losses = run_ranks(save, ranks, rule, changes, str(tmp_path))[0]
    again, later = run_ranks(load, other_ranks, rule, others, str(tmp_path), str(tmp_path / "again"))[0]
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())
    assert whole["optim.momentum.final_norm.weight"].any() and "optim.mean_square.final_norm.weight" not in whole
    assert whole["optim.mean_square.blocks.0.mlp.up.weight"].any()
    assert later == [(pytest.approx(loss, rel=1e-5), pytest.approx(norm, rel=1e-4)) for loss, norm in losses]
    return whole


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("native, 1", "native, ZeRO-3 on 2"),
        ("native, ZeRO-3 on 2", "deepspeed, ZeRO-3 on 2"),
        ("deepspeed, ZeRO-3 on 2", "native, tensor 2"),
        ("deepspeed, ZeRO-1 on 2", "native, pipeline 2"),
        ("native, tensor 2", "deepspeed, ZeRO-0 on 2"),
    ],
)
def test_states_of_another_optimizer_move_between_layouts(saved, loaded, tmp_path):
    check("elementwise", saved, loaded, tmp_path)


@pytest.mark.parametrize("loaded", ["native, ZeRO-3 on 2", "native, tensor 2"])
def test_states_of_other_shapes_and_formats_are_cut_with_their_parameter(loaded, tmp_path):
    whole = check("reduced", "native, 1", loaded, tmp_path)
    rows = whole["optim.row_count.blocks.0.mlp.up.weight"]
    assert rows.shape == (whole["model.blocks.0.mlp.up.weight"].shape[0], 1) and (rows == 2).all()


def test_the_memory_estimate_counts_the_slots():
    """AdamW keeps 8 bytes a parameter; momentum alone would keep 4."""
    config = layout_job()
    layout = Layout.of(config, 1)
    adamw = MemoryModel(config.model, config.optim).of_rank(config, layout, 0)
    other = job("elementwise")
    other.optim.name = "momentum"
    slots.SLOTS["momentum"] = lambda optim, name, shape: (Slot("momentum", shape),)
    momentum = MemoryModel(other.model, other.optim).of_rank(other, layout, 0)
    assert adamw.parameters == momentum.parameters
    difference = adamw.optimizer - momentum.optimizer
    assert difference == adamw.parameters, "4 bytes a parameter, as its fp32 master has"
    assert slot_bytes(OptimConfig(moments="bf16"), "a", (2, 3)) == 4

"""A non-finite loss or gradient on one rank moves no parameter on any rank; the run continues."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.jobs import batches, gather, job, layout_job
from support.ranks import run_ranks

from megatrain.engine.build import build_engine
from megatrain.optim.objective import NextToken
from megatrain.parallel.layout import Layout

ENGINES = [
    ("native", 0, 1, "fp32", "fp32"),
    ("native", 0, 1, "bf16", "fp32"),
    ("native", 0, 1, "fp16", "fp32"),
    ("deepspeed", 0, 2, "fp32", "fp32"),
    ("deepspeed", 1, 2, "fp32", "fp32"),
    ("deepspeed", 2, 2, "fp32", "fp32"),
    ("deepspeed", 3, 2, "fp32", "fp32"),
    ("deepspeed", 0, 2, "bf16", "bf16"),
    ("deepspeed", 1, 2, "bf16", "fp32"),
    ("deepspeed", 2, 2, "bf16", "fp32"),
    ("deepspeed", 3, 2, "bf16", "fp32"),
]


def poison(world, config, folder):
    """Run a clean step, one whose loss is NaN only on the last rank, and a clean one; return the states around the
    middle one."""
    engine = build_engine(config, world)
    engine.train_step(batches(config, 1, world.rank, world.size), 1e-3, 1)
    before = gather(engine, Path(folder) / "before", world)
    steps_before = engine.counters().optimizer.step
    poisoned = batches(config, 2, world.rank, world.size)
    if world.rank == world.size - 1:
        weights = torch.full(poisoned[-1].labels.shape, float("nan"))
        poisoned[-1] = replace(poisoned[-1], loss_weights=weights)
    bad = engine.train_step(poisoned, 1e-3, 2)
    after = gather(engine, Path(folder) / "after", world)
    steps_after = engine.counters().optimizer.step
    good = engine.train_step(batches(config, 3, world.rank, world.size), 1e-3, 3)
    end = gather(engine, Path(folder) / "end", world)
    return (
        before,
        after,
        end,
        (steps_before, steps_after),
        (bool(bad.updated), float(bad.grad_norm)),
        bool(good.updated),
    )


@pytest.mark.parametrize(("engine", "zero", "ranks", "precision", "accumulate"), ENGINES)
def test_a_nan_on_one_rank_is_vetoed_on_all(engine, zero, ranks, precision, accumulate, tmp_path):
    """Parameters, moments and the step count keep their bits, all ranks report it, and the next step moves them."""
    config = job(engine, zero, precision=precision, accumulate=accumulate)
    for before, after, end, (first, second), (updated, norm), recovered in run_ranks(
        poison, ranks, config, str(tmp_path)
    ):
        assert not updated and not (norm < float("inf"))
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        assert first == second == 1
        assert recovered
        assert any(not torch.equal(tensor, end[key]) for key, tensor in after.items() if key.startswith("model."))


LAYOUTS = [
    (1, {}),
    (2, {"zero": 3}),
    (2, {"tp": 2}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "schedule": "zbv_zero_bubble", "virtual_stages": 2}),
    (4, {"pp": 2, "zero": 1}),
    (1, {"engine": "deepspeed"}),
    (2, {"engine": "deepspeed"}),
    (2, {"engine": "deepspeed", "zero": 2}),
    (2, {"engine": "deepspeed", "zero": 3}),
    (2, {"engine": "deepspeed", "tp": 2}),
]


class Shifted(NextToken):
    """Next-token prediction plus a constant."""

    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def __call__(self, head, hidden, micro_batch):
        loss, scalars = super().__call__(head, hidden, micro_batch)
        return loss + self.amount, scalars


def lose(engine, layout, world, amount):
    """Add `amount` to the loss of one rank's micro-batches; its gradients do not change."""
    last_stage = layout.num_stages - 1
    if world.rank != max(r for r in range(world.size) if last_stage in layout.stages_of(layout.coordinate(r).pp)):
        return
    engine.meter.objective = Shifted(amount)


def overflow(world, config, folder):
    """Run a clean step, one with an infinite loss on one rank, and a clean one; return the results and states."""
    engine, layout = build_engine(config, world), Layout.of(config, world.size)
    told, states = [], []
    for step, amount in enumerate((0.0, float("inf"), float("-inf")), start=1):
        lose(engine, layout, world, amount)
        data = batches(config, step, layout.dp_rank(world.rank), layout.dp)
        result = engine.train_step(data, 1e-3, step)
        told.append((bool(result.updated), float(result.loss_sum), float(result.grad_norm)))
        states.append(gather(engine, Path(folder) / str(step), world))
    return told, states


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_an_infinite_loss_with_finite_gradients_is_vetoed_on_all(ranks, changes, tmp_path):
    """One rank's loss overflows, its gradients do not: no parameter of any rank moves, and all ranks report it."""
    results = run_ranks(overflow, ranks, layout_job(micro=4, **changes), str(tmp_path))
    for told, states in results:
        assert [updated for updated, _, _ in told] == [True, False, False]
        (_, loss, norm), (_, bad_loss, bad_norm), _ = told
        assert math.isfinite(loss + norm) and not math.isfinite(bad_norm)
        assert not math.isfinite(bad_loss) or "tp" in changes  # tensor parallelism counts only one tensor rank's loss
        for later in states[1:]:
            assert all(torch.equal(tensor, later[key]) for key, tensor in states[0].items())

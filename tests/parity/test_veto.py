"""A gradient that is not finite on one rank moves no parameter on any; the run goes on after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jobs import batches, gather, job
from ranks import run_ranks

from megatrain.engine.build import build_engine

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
    """Step, then a step whose loss is NaN on the last rank alone, then a clean one; the state around the middle one."""
    engine = build_engine(config, world)
    engine.train_step(batches(config, 1, world.rank, world.size), 1e-3, 1)
    before = gather(engine, Path(folder) / "before", world)
    steps_before = engine.counters()["optimizer"]["step"]
    poisoned = batches(config, 2, world.rank, world.size)
    if world.rank == world.size - 1:
        weights = torch.full(poisoned[-1].labels.shape, float("nan"))
        poisoned[-1] = replace(poisoned[-1], loss_weights=weights)
    bad = engine.train_step(poisoned, 1e-3, 2)
    after = gather(engine, Path(folder) / "after", world)
    steps_after = engine.counters()["optimizer"]["step"]
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
    """Parameters, moments and the step count are bit-unchanged, all ranks say so, and the next step moves them."""
    config = job(engine, zero, precision=precision, accumulate=accumulate)
    for before, after, end, (first, second), (updated, norm), recovered in run_ranks(
        poison, ranks, config, str(tmp_path)
    ):
        assert not updated and not (norm < float("inf"))
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        assert first == second == 1
        assert recovered
        assert any(not torch.equal(tensor, end[key]) for key, tensor in after.items() if key.startswith("model."))

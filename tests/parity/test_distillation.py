"""Distillation gives the same losses, parts and parameters in every engine and layout."""

from __future__ import annotations

import pytest
import torch
from support import jobs
from support.jobs import compare, layout_job, llama, parity_steps, rows
from support.ranks import run_ranks

from megatrain.engine import build
from megatrain.model.count import parameter_shapes
from megatrain.optim.distillation import Distillation
from megatrain.training.teacher import send_teacher

LAYOUTS = [
    (2, {"engine": "deepspeed", "zero": 3}),
    (2, {"engine": "deepspeed", "tp": 2}),
    (2, {"engine": "deepspeed", "zero": 1, "cp": 2}),
    (2, {"cp": 2, "cp_kind": "ring"}),
    (4, {"tp": 2, "pp": 2}),
    (2, {"pp": 2, "schedule": "zbv_zero_bubble", "virtual_stages": 2}),
]
TEACHER = llama(num_layers=3, hidden_size=40, num_heads=4, num_kv_heads=2, head_size=10, ffn_size=50)


class Weights:
    """Stands for the files of a teacher, which only rank 0 reads."""

    def read(self, name):
        shape = parameter_shapes(TEACHER)[name]
        draw = torch.Generator().manual_seed(len(name) + sum(name.encode()))
        return torch.randn(shape, generator=draw) / shape[-1] ** 0.5 if len(shape) > 1 else torch.ones(shape)


def steps(world, config, folder):
    """Run `parity_steps` with a teacher; return also the parts of an evaluation's loss."""
    build_engine, made = build.build_engine, []

    def building(config, world):
        objective = Distillation(0.7, 2.0, 0.0)
        made.append(build_engine(config, world, objective))
        objective.teacher = send_teacher(TEACHER, Weights() if world.is_main else None, config, world)
        return made[0]

    jobs.build_engine = building
    results = parity_steps(world, config, folder)
    layout = jobs.Layout.of(config, world.size)
    measured = made[0].measure(jobs.batches(config, 7, layout.dp_rank(world.rank), layout.dp, ignored=True))
    scalars = {name: float(value) for name, value in measured.scalars.items()}
    return results, scalars, float(measured.loss_sum) / int(measured.count)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(steps, 1, layout_job(micro=2), str(tmp_path_factory.mktemp("alone")))[0]


def test_the_loss_of_an_evaluation_is_the_cross_entropy(alone):
    _, scalars, loss = alone
    assert loss == pytest.approx(scalars["cross_entropy"], rel=1e-6)
    assert scalars["divergence"] > 0.01


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_every_layout_gives_the_same(ranks, changes, alone, tmp_path):
    expected, scalars, _ = alone
    results = run_ranks(steps, ranks, layout_job(micro=rows(changes, ranks), **changes), str(tmp_path))
    compare([result for result, _, _ in results], expected)
    for _, found, _ in results:
        assert found == pytest.approx(scalars, rel=1e-4)

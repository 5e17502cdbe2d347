"""PPO's loss of a policy and its value head gives the same results in every engine and layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import jobs
from support.jobs import compare, layout_job, parity_steps, rows
from support.ranks import run_ranks

LAYOUTS = [
    (2, {"engine": "deepspeed", "zero": 3}),
    (2, {"engine": "deepspeed", "tp": 2}),
    (2, {"zero": 3}),
    (2, {"cp": 2, "cp_kind": "ring"}),
    (4, {"tp": 2, "pp": 2}),
]
MADE = jobs.batches


def job_of(**settings):
    """Return the config of a job by PPO, with weights that make each term of the loss count."""
    config = layout_job(**settings)
    config.method.name, config.method.value_weight, config.method.temperature = "ppo", 0.5, 0.8
    return config


def sampled(*args, **kwargs):
    """Return micro-batches whose tokens have advantages, returns and what was computed at sampling, by their ids."""

    def with_figures(batch):
        ids = batch.tokens.double()
        figures = {
            "old_log_probs": 0.3 * torch.cos(ids) - 4.6,
            "advantages": torch.sin(1.3 * ids),
            "old_values": 0.3 * torch.sin(ids),
            "returns": torch.cos(0.7 * ids) + 0.5,
        }
        return replace(batch, **{name: values.float() for name, values in figures.items()})

    return [with_figures(batch) for batch in MADE(*args, **kwargs)]


def steps(world, config, folder):
    """Run `parity_steps` on such micro-batches."""
    jobs.batches = sampled
    return parity_steps(world, config, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(steps, 1, job_of(micro=2), str(tmp_path_factory.mktemp("alone")))[0]


def test_the_value_head_begins_at_0_and_is_kept_apart_from_the_model(alone):
    start, _, end = alone[2]
    assert not start["critic.weight"].any() and end["critic.weight"].abs().min() > 0
    assert not [name for name in end if name.startswith("model.") and "value" in name]
    assert "optim.exp_avg.value.weight" in end


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_every_layout_gives_one_result(ranks, changes, alone, tmp_path):
    compare(run_ranks(steps, ranks, job_of(micro=rows(changes, ranks), **changes), str(tmp_path)), alone)

"""An objective over the log-probabilities of whole sequences gives the same losses in every engine and layout."""

from __future__ import annotations

import pytest
import torch
from support.jobs import compare, layout_job, parity_steps, rows
from support.ranks import run_ranks

from megatrain.engine import build
from megatrain.kernels import IGNORE_INDEX

LAYOUTS = [
    (2, {"engine": "deepspeed", "zero": 3}),
    (2, {"engine": "deepspeed", "tp": 2}),
    (2, {"engine": "deepspeed", "cp": 2, "zero": 1}),
    (2, {"zero": 3}),
    (2, {"cp": 2}),
    (2, {"cp": 2, "cp_kind": "ring"}),
    (4, {"tp": 2, "pp": 2}),
    (4, {"tp": 2, "cp": 2}),
    (2, {"pp": 2, "schedule": "zbv_zero_bubble", "virtual_stages": 2}),
]


class WholeSequences:
    """Minus the log-sigmoid of each sequence's log-probability: not linear in any token's."""

    scalar_names = ("log_prob",)

    def count(self, micro_batch):
        return int((micro_batch.labels != IGNORE_INDEX).sum())

    def __call__(self, head, hidden, micro_batch):
        log_probs = head.token_log_probs(hidden, micro_batch.labels)
        sums = head.sum_over_context(log_probs.sum(1))
        loss = -torch.nn.functional.logsigmoid(sums * 0.01 + 0.5).sum() / head.context_size
        return loss, (sums.sum() / head.context_size,)


def steps(world, config, folder):
    """Run `parity_steps` with the objective of this module."""
    build_engine = build.build_engine
    from support import jobs

    jobs.build_engine = lambda config, world: build_engine(config, world, WholeSequences())
    return parity_steps(world, config, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(steps, 1, layout_job(micro=2), str(tmp_path_factory.mktemp("alone")))[0]


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_every_layout_gives_its_losses_gradients_and_parameters(ranks, changes, alone, tmp_path):
    compare(run_ranks(steps, ranks, layout_job(micro=rows(changes, ranks), **changes), str(tmp_path)), alone)


def test_the_reference_kernels_give_the_same(alone, tmp_path):
    config = layout_job(micro=2)
    config.kernels = "reference"
    compare(run_ranks(steps, 1, config, str(tmp_path)), alone)

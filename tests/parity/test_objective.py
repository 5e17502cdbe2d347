"""A custom objective trains in every engine and layout, and its scalars cover the whole job."""

from __future__ import annotations

import pytest
from support.jobs import batches, layout_job
from support.ranks import run_ranks

from megatrain.engine.build import build_engine
from megatrain.optim.objective import NextToken
from megatrain.parallel.layout import Layout

LAYOUTS = [
    (2, {"engine": "deepspeed", "zero": 3}),
    (2, {"engine": "deepspeed", "tp": 2}),
    (2, {"zero": 2}),
    (2, {"cp": 2}),
    (4, {"tp": 2, "pp": 2}),
    (2, {"pp": 2, "schedule": "zbv_zero_bubble", "virtual_stages": 2}),
]


class Doubled(NextToken):
    """Twice the cross-entropy; its scalars are the plain loss and the number of micro-batches a token."""

    scalar_names = ("plain_loss", "micro_batches")

    def __call__(self, head, hidden, micro_batch):
        loss, _ = super().__call__(head, hidden, micro_batch)
        return 2 * loss, (loss, loss.detach() * 0 + 1)


def steps(world, config, objective):
    """Run three steps and an evaluation; return losses, norms and the objective's scalars."""
    engine, layout = build_engine(config, world, objective), Layout.of(config, world.size)
    seen = []
    for step in (1, 2, 3):
        data = batches(config, step, layout.dp_rank(world.rank), layout.dp, ignored=True)
        result = engine.train_step(data, config.optim.lr, step)
        aux = {name: float(value) for name, value in result.aux.items()}
        seen.append((float(result.loss_sum) / int(result.tokens), float(result.grad_norm), int(result.tokens), aux))
    loss_sum, tokens = engine.evaluate(batches(config, 9, layout.dp_rank(world.rank), layout.dp))
    return seen, float(loss_sum) / int(tokens)


@pytest.fixture(scope="module")
def alone():
    """Run one process with the doubled and with the plain objective."""
    config = layout_job(micro=2)
    return [run_ranks(steps, 1, config, objective)[0] for objective in (Doubled(), NextToken())]


def test_the_objective_is_minimised(alone):
    """Loss, gradient and evaluation double at the first step; the plain loss is one of the scalars."""
    (doubled, doubled_heldout), (plain, plain_heldout) = alone
    (loss, norm, tokens, aux), (plain_loss, plain_norm, plain_tokens, nothing) = doubled[0], plain[0]
    assert loss == pytest.approx(2 * plain_loss, rel=1e-6) and norm == pytest.approx(2 * plain_norm, rel=1e-5)
    assert aux["plain_loss"] == pytest.approx(plain_loss, rel=1e-6) and nothing == {}
    assert tokens == plain_tokens and aux["micro_batches"] == pytest.approx(8 / tokens)
    assert doubled_heldout == pytest.approx(2 * plain_heldout, rel=1e-3)


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_every_layout_gives_its_losses_and_scalars(ranks, changes, alone):
    (expected, heldout), _ = alone
    for seen, own_heldout in run_ranks(steps, ranks, layout_job(micro=2, **changes), Doubled()):
        assert own_heldout == pytest.approx(heldout, rel=1e-5)
        for (loss, norm, tokens, aux), (true_loss, true_norm, true_tokens, true_aux) in zip(
            seen, expected, strict=True
        ):
            assert (loss, tokens) == (pytest.approx(true_loss, rel=1e-5), true_tokens)
            assert norm == pytest.approx(true_norm, rel=1e-4)
            assert aux["plain_loss"] == pytest.approx(true_aux["plain_loss"], rel=1e-5)

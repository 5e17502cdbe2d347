"""The whole model that every rank samples with has the engine's weights, bit for bit, in every layout."""

from __future__ import annotations

import pytest
import torch
from support.jobs import layout_job, rows
from support.ranks import run_ranks

from megatrain.engine.build import build_engine
from megatrain.engine.whole_model import WholeModel, weights_checksum
from megatrain.model.count import parameter_shapes
from megatrain.model.init import build_model

LAYOUTS = [
    (1, {}),
    (2, {"zero": 3}),
    (4, {"tp": 2, "pp": 2}),
    (2, {"engine": "deepspeed", "zero": 2}),
    (2, {"engine": "deepspeed", "tp": 2}),
]


def gathered(world, config):
    """Return the weights of the whole model on this rank, their checksum, and that of the engine's state."""
    engine = build_engine(config, world)
    whole = WholeModel(config, world)
    whole.take(engine.state())
    checksum = weights_checksum(engine.state(), parameter_shapes(config.model), world)
    return {name: parameter.clone() for name, parameter in whole.model.named_parameters()}, whole.checksum(), checksum


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_every_rank_holds_the_whole_model(ranks, changes):
    config = layout_job(micro=rows(changes, ranks), **changes)
    expected = dict(build_model(config.model, config.seed).named_parameters())
    results = run_ranks(gathered, ranks, config)
    assert {int(whole, 16) >> 1 for _, whole, _ in results} == {checksum for *_, checksum in results}
    assert len({checksum for *_, checksum in results}) == 1
    for weights, *_ in results:
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())

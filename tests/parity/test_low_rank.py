"""Low-rank layers train the same in every layout, and nothing else changes; a resumed run continues bit for bit."""

from __future__ import annotations

import pytest
import torch
from support.jobs import compare, deviations, gather, layout_job, parity_steps, rows, train
from support.ranks import run_ranks
from support.records import at

from megatrain.checkpoint.store import CheckpointStore, load_into, verify
from megatrain.engine.build import build_engine
from megatrain.engine.whole_model import WholeModel

LAYOUTS = [
    (2, {"zero": 0}),
    (2, {"zero": 3}),
    (2, {"tp": 2}),
    (2, {"cp": 2}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "schedule": "zbv_zero_bubble", "virtual_stages": 2}),
    (4, {"tp": 2, "zero": 2}),
    (2, {"engine": "deepspeed", "zero": 0}),
    (2, {"engine": "deepspeed", "zero": 2, "cp": 2}),
    (2, {"engine": "deepspeed", "zero": 3}),
]


def low_rank_job(dropout: float = 0.0, **parallel):
    """Return the config of a job with low-rank layers beside most projections."""
    config = layout_job(**parallel)
    config.method.lora.rank, config.method.lora.dropout = 3, dropout
    config.method.lora.targets = ["q", "v", "o", "gate", "down"]
    return config


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    config = low_rank_job(micro=8)
    return run_ranks(parity_steps, 1, config, str(tmp_path_factory.mktemp("alone")))[0]


def test_only_the_low_rank_layers_change_and_have_states(alone):
    start, _, end = alone[2]
    changed = {name for name in start if name.startswith("model.") and not torch.equal(start[name], end[name])}
    adapters = {name for name in start if name.endswith((".lora_a", ".lora_b")) and name.startswith("model.")}
    assert changed == adapters and len(adapters) == 5 * 5 * 2
    assert {name.split(".", 2)[2] for name in end if name.startswith("optim.")} == {
        name.removeprefix("model.") for name in adapters
    }


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_every_layout_gives_one_result(ranks, changes, alone, tmp_path):
    config = low_rank_job(micro=rows(changes, ranks), **changes)
    compare(run_ranks(parity_steps, ranks, config, str(tmp_path)), alone)


@pytest.mark.parametrize("zero", [1, 3])
def test_deepspeed_in_bf16_keeps_the_frozen_weights_in_fp32(zero, alone, tmp_path):
    config = low_rank_job(engine="deepspeed", zero=zero, micro=4)
    config.precision.name = "bf16"
    results = run_ranks(parity_steps, 2, config, str(tmp_path))
    found = deviations(results, alone)
    assert found["start"] == 0 and found["loss"] < 0.01 and found["heldout_loss"] < 0.01 and found["parameter"] < 0.01
    start, _, end = results[0][2]
    assert {name for name in start if name.startswith("model.") and not torch.equal(start[name], end[name])} == {
        name for name in start if name.startswith("model.") and "lora_" in name
    }


def sampler_logits(world, config):
    """Return the logits of the whole model that a rank samples with, after a step."""
    engine = build_engine(config, world)
    train(engine, config, world.rank, world.size, 1, 1)
    whole = WholeModel(config, world)
    whole.take(engine.state())
    return whole.model(torch.arange(12).view(1, 12)).detach()


def test_the_model_to_sample_with_has_deepspeeds_low_rank_layers():
    expected = run_ranks(sampler_logits, 1, low_rank_job(micro=8))[0]
    for found in run_ranks(sampler_logits, 2, low_rank_job(engine="deepspeed", zero=3, micro=4)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def stopped(world, config, folder):
    """Train four steps, and the last two again from a checkpoint in a new engine; return both and their states."""
    engine = build_engine(config, world)
    train(engine, config, 0, 1, 1, 2)
    saved = CheckpointStore(folder / "saved", world).save(engine.state(), at(2, engine.counters()))
    undisturbed = train(engine, config, 0, 1, 3, 4)
    resumed = build_engine(config, world)
    manifest = verify(saved)
    load_into(saved, manifest, resumed.state(), world)
    resumed.restore(manifest.counters)
    again = train(resumed, config, 0, 1, 3, 4)
    return undisturbed, again, gather(engine, folder / "a", world), gather(resumed, folder / "b", world)


@pytest.mark.parametrize("engine", [{}, {"engine": "deepspeed", "zero": 3}], ids=str)
def test_a_resumed_run_continues_bit_for_bit_with_dropout_too(engine, tmp_path):
    config = low_rank_job(dropout=0.2, micro=8, **engine)
    undisturbed, again, end, end_again = run_ranks(stopped, 1, config, tmp_path)[0]
    assert again == undisturbed
    assert all(torch.equal(end[name], end_again[name]) for name in end)

"""A checkpoint of any layout of either engine continues on any other: bit-equal state, the undisturbed run's losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs import batches, gather, layout_job, rows
from support.ranks import run_ranks
from support.records import at

from megatrain.checkpoint.store import CheckpointStore, load_into, verify
from megatrain.engine.build import build_engine
from megatrain.parallel.layout import Layout
from megatrain.parallel.rules import check

SAVED_AT, LAST = 2, 4
LAYOUTS = {
    "one": (1, {}),
    "zero3": (4, {"zero": 3}),
    "hybrid": (4, {"zero": 2, "dp_replicate": 2}),
    "tp2 zero3": (4, {"tp": 2, "zero": 3}),
    "tp4": (4, {"tp": 4}),
    "cp2 zero1": (4, {"cp": 2, "zero": 1}),
    "ring2 zero3": (2, {"cp": 2, "cp_kind": "ring", "zero": 3}),
    "pp4": (4, {"pp": 4, "schedule": "gpipe"}),
    "pp2 tp2": (4, {"pp": 2, "tp": 2}),
    "pp2 v zero3": (4, {"pp": 2, "virtual_stages": 2, "schedule": "zbv_zero_bubble", "zero": 3}),
    "deepspeed0": (2, {"engine": "deepspeed", "zero": 0}),
    "deepspeed2": (2, {"engine": "deepspeed", "zero": 2}),
    "deepspeed3": (4, {"engine": "deepspeed", "zero": 3}),
    "deepspeed1 tp2": (2, {"engine": "deepspeed", "zero": 1, "tp": 2}),
    "deepspeed3 tp2": (4, {"engine": "deepspeed", "zero": 3, "tp": 2}),
    "deepspeed0 tp4": (4, {"engine": "deepspeed", "zero": 0, "tp": 4}),
}
DAILY = 7
"""These first pairs have each axis, ZeRO stage and engine on one side at least; only `--all` runs the others."""

PAIRS = [
    ("deepspeed3", "pp2 tp2", "gpt2"),
    ("pp2 tp2", "deepspeed3", "gpt2"),
    ("deepspeed2", "tp4", "llama"),
    ("zero3", "deepspeed0", "llama"),
    ("deepspeed0", "hybrid", "gpt2"),
    ("pp2 v zero3", "one", "gpt2"),
    ("cp2 zero1", "deepspeed3", "llama"),
    ("one", "pp2 v zero3", "gpt2"),
    ("tp2 zero3", "pp4", "llama"),
    ("pp4", "ring2 zero3", "llama"),
    ("ring2 zero3", "tp2 zero3", "llama"),
    ("deepspeed3 tp2", "pp2 v zero3", "gpt2"),
    ("pp2 v zero3", "deepspeed3 tp2", "gpt2"),
    ("deepspeed3", "deepspeed0 tp4", "llama"),
    ("deepspeed0 tp4", "deepspeed1 tp2", "llama"),
    ("tp4", "deepspeed3 tp2", "llama"),
]


def train(engine, config, world, first, last):
    layout = Layout.of(config, world.size)
    losses = []
    for step in range(first, last + 1):
        data = batches(config, step, layout.dp_rank(world.rank), layout.dp)
        result = engine.train_step(data, config.optim.lr, step)
        losses.append(float(result.loss_sum) / int(result.tokens))
    return losses


def begin(world, config, folder):
    """Train, save and continue; return the losses after the save and the gathered state at the save."""
    engine = build_engine(config, world)
    train(engine, config, world, 1, SAVED_AT)
    CheckpointStore(Path(folder) / "checkpoints", world).save(engine.state(), at(SAVED_AT, engine.counters()))
    whole = gather(engine, Path(folder) / "whole", world)
    return train(engine, config, world, SAVED_AT + 1, LAST), whole


def go_on(world, config, folder, whole_folder):
    """Load into a fresh engine; return the gathered state right after, its counters, and the losses that follow."""
    engine = build_engine(config, world)
    saved = Path(folder) / "checkpoints" / f"step_{SAVED_AT:08d}"
    manifest = verify(saved, world)
    load_into(saved, manifest, engine.state(), world)
    engine.restore(manifest.counters)
    whole = gather(engine, Path(whole_folder), world)
    counters = engine.counters()
    return train(engine, config, world, SAVED_AT + 1, LAST), whole, counters, manifest.counters.optimizer


@pytest.fixture(scope="module")
def origins(tmp_path_factory):
    """Return a function that makes each run with a checkpoint once."""
    made = {}

    def get(name, family):
        if (name, family) not in made:
            folder = str(tmp_path_factory.mktemp("origin"))
            ranks, changes = LAYOUTS[name]
            config = layout_job(family=family, micro=rows(changes, ranks), **changes)
            check(config, ranks)
            made[name, family] = (folder, *run_ranks(begin, ranks, config, folder)[0])
        return made[name, family]

    return get


@pytest.mark.parametrize(
    ("saved", "resumed", "family"),
    [*PAIRS[:DAILY], *(pytest.param(*pair, marks=pytest.mark.combination) for pair in PAIRS[DAILY:])],
)
def test_another_layout_continues_with_bit_equal_state_and_losses(saved, resumed, family, origins, tmp_path):
    """Parameters and both moments bit-equal once gathered, the step count and groups kept, two losses within 1e-5."""
    folder, expected, whole = origins(saved, family)
    ranks, changes = LAYOUTS[resumed]
    config = layout_job(family=family, micro=rows(changes, ranks), **changes)
    check(config, ranks)
    losses, again, counters, optimizer = run_ranks(go_on, ranks, config, folder, str(tmp_path))[0]
    assert whole.keys() == again.keys() and len(whole) % 3 == 0
    for key, tensor in whole.items():
        assert torch.equal(tensor, again[key]), key
    assert counters.optimizer.step == SAVED_AT
    for name, group in optimizer.groups.items():
        assert sorted(counters.optimizer.groups[name].parameters) == sorted(group.parameters)
    assert losses == pytest.approx(expected, rel=1e-5)

"""A checkpoint of any stage, engine and number of ranks continues on any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import records
from support.jobs import gather, gpt2, job, llama, train
from support.ranks import run_ranks

from megatrain.checkpoint.store import CheckpointStore, load_into, verify
from megatrain.engine.build import build_engine

SAVED_AT, LAST = 2, 4


def begin(world, config, folder):
    """Train to `SAVED_AT`, save and continue; return the losses after the save and the whole state at the save."""
    engine = build_engine(config, world)
    train(engine, config, world.rank, world.size, 1, SAVED_AT)
    store = CheckpointStore(Path(folder) / "checkpoints", world)
    store.save(engine.state(), records.at(SAVED_AT, engine.counters()))
    whole = gather(engine, Path(folder) / "whole", world)
    return train(engine, config, world.rank, world.size, SAVED_AT + 1, LAST), whole


def go_on(world, config, folder, whole_folder):
    """Load the checkpoint into a fresh engine; return the whole state right after and the losses that follow."""
    engine = build_engine(config, world)
    saved = Path(folder) / "checkpoints" / f"step_{SAVED_AT:08d}"
    manifest = verify(saved, world)
    load_into(saved, manifest, engine.state(), world)
    engine.restore(manifest.counters)
    whole = gather(engine, Path(whole_folder), world)
    assert engine.counters().optimizer.step == SAVED_AT
    return train(engine, config, world.rank, world.size, SAVED_AT + 1, LAST), whole


@pytest.fixture(scope="module")
def origins(tmp_path_factory):
    """Return a function that makes each run with a checkpoint once."""
    made = {}

    def get(ranks, config, name):
        if name not in made:
            folder = str(tmp_path_factory.mktemp("origin"))
            made[name] = (folder, *run_ranks(begin, ranks, config, folder)[0])
        return made[name]

    return get


LAYOUTS = {
    "native": (1, "native", 0),
    "zero0 x 2": (2, "deepspeed", 0),
    "zero1 x 1": (1, "deepspeed", 1),
    "zero1 x 2": (2, "deepspeed", 1),
    "zero2 x 2": (2, "deepspeed", 2),
    "zero2 x 4": (4, "deepspeed", 2),
    "zero3 x 1": (1, "deepspeed", 3),
    "zero3 x 2": (2, "deepspeed", 3),
    "zero3 x 4": (4, "deepspeed", 3),
}
PAIRS = [
    ("zero3 x 2", "zero1 x 1"),
    ("zero3 x 2", "zero2 x 4"),
    ("zero3 x 2", "native"),
    ("native", "zero3 x 2"),
    ("native", "zero0 x 2"),
    ("zero2 x 4", "zero3 x 2"),
    ("zero1 x 2", "zero3 x 1"),
    ("zero0 x 2", "zero3 x 4"),
    ("zero2 x 2", "native"),
    ("zero3 x 4", "zero0 x 2"),
]
SAME = ["native", "zero0 x 2", "zero1 x 2", "zero2 x 2", "zero3 x 2"]


def at(name, **model):
    ranks, engine, zero = LAYOUTS[name]
    return ranks, job(engine, zero, model=llama(**model))


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_another_layout_continues_with_bit_equal_state(saved, resumed, origins, tmp_path):
    """Parameters and both moments are bit-equal after gathering; two further losses agree within 1e-5, norms 1e-4."""
    folder, expected, whole = origins(*at(saved), saved)
    losses, again = run_ranks(go_on, *at(resumed), folder, str(tmp_path))[0]
    assert whole.keys() == again.keys() and len(whole) % 3 == 0
    for key, tensor in whole.items():
        assert torch.equal(tensor, again[key]), key
    for (loss, norm), (true_loss, true_norm) in zip(losses, expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)


@pytest.mark.parametrize("layout", SAME)
def test_the_same_layout_continues_bit_for_bit(layout, origins, tmp_path):
    """Every loss and norm after the resume equals that of the run that was never stopped."""
    folder, expected, _ = origins(*at(layout), layout)
    losses, _ = run_ranks(go_on, *at(layout), folder, str(tmp_path))[0]
    assert losses == expected


@pytest.mark.parametrize(
    ("saved", "resumed"), [((2, "deepspeed", 3), (1, "native", 0)), ((1, "native", 0), (2, "deepspeed", 2))]
)
def test_a_tied_model_with_biases_crosses_engines(saved, resumed, tmp_path):
    """In GPT-2's family a tied weight is stored once, and biases and norms have their own moments."""
    (ranks, *kind), (other_ranks, *other) = saved, resumed
    expected, whole = run_ranks(begin, ranks, job(*kind, model=gpt2()), str(tmp_path))[0]
    assert "model.head.weight" not in whole and "optim.exp_avg.blocks.0.attn.k.bias" in whole
    losses, again = run_ranks(go_on, other_ranks, job(*other, model=gpt2()), str(tmp_path), str(tmp_path / "w"))[0]
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())
    assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in expected], rel=1e-5)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        (("deepspeed", 3, 2, "fp32"), ("native", 0, 1, "fp32")),
        (("deepspeed", 1, 2, "fp32"), ("deepspeed", 3, 2, "fp32")),
        (("native", 0, 1, "fp32"), ("deepspeed", 1, 2, "fp32")),
        (("deepspeed", 2, 2, "fp32"), ("deepspeed", 2, 2, "fp32")),
        (("deepspeed", 1, 2, "fp32"), ("deepspeed", 1, 2, "fp32")),
        (("deepspeed", 0, 2, "bf16"), ("deepspeed", 3, 2, "fp32")),
        (("native", 0, 1, "fp32"), ("native", 0, 1, "fp32")),
    ],
)
def test_bf16_keeps_its_fp32_masters_across_layouts(saved, resumed, tmp_path):
    """In bf16 the fp32 state is bit-equal too; losses follow exactly on the same layout, within 1e-3 on another."""
    (engine, zero, ranks, accumulate), (other, other_zero, other_ranks, other_accumulate) = saved, resumed
    config = job(engine, zero, precision="bf16", accumulate=accumulate)
    expected, whole = run_ranks(begin, ranks, config, str(tmp_path))[0]
    config = job(other, other_zero, precision="bf16", accumulate=other_accumulate)
    losses, again = run_ranks(go_on, other_ranks, config, str(tmp_path), str(tmp_path / "w"))[0]
    assert all(torch.equal(tensor, again[key]) for key, tensor in whole.items())
    if saved == resumed:
        assert losses == expected
    else:
        assert [loss for loss, _ in losses] == pytest.approx([loss for loss, _ in expected], rel=1e-3)

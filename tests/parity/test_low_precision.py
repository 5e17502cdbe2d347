"""bf16 moments and fp8 products: results close to higher precision, and the same bits after a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.jobs import job, layout_job, llama, train
from support.ranks import run_ranks
from support.records import at

from megatrain.checkpoint.store import CheckpointStore, load_into, verify
from megatrain.engine.build import build_engine
from megatrain.parallel.rules import check


def losses(world, config, folder=None, first=1, last=12):
    """Return a run's losses and norms; with a folder, save the run there at its end or start from there."""
    engine: Any = build_engine(config, world)
    if first > 1:
        source = folder / f"step_{first - 1:08d}"
        manifest = verify(source)
        load_into(source, manifest, engine.state(), None)
        engine.restore(manifest.counters)
    seen = train(engine, config, world.rank, world.size, first, last)
    if folder is not None and first == 1:
        CheckpointStore(folder, world).save(engine.state(), at(last, engine.counters()))
    assert getattr(engine.optimizer, "train_step", last) == last  # the rounding depends on it
    dtypes = {name.split(".")[1]: tensor.dtype for name, tensor in engine.state().items() if name.startswith("optim.")}
    return seen, dtypes


def low(moments="fp32", precision="bf16", **changes):
    config = layout_job(micro=changes.pop("micro", 4), **changes)
    config.model = llama(hidden_size=32, head_size=8, ffn_size=48, init_std=0.1)
    config.precision.name, config.optim.moments = precision, moments
    return config


@pytest.mark.parametrize(("ranks", "changes"), [(1, {}), (2, {"zero": 3}), (2, {"tp": 2}), (2, {"pp": 2})], ids=str)
def test_moments_in_bf16_stay_near_fp32_ones(ranks, changes):
    config = low("bf16", **changes)
    check(config, ranks)
    (found, dtypes), *_ = run_ranks(losses, ranks, config)
    assert set(dtypes.values()) == {torch.bfloat16} and set(dtypes) == {"exp_avg", "exp_avg_sq"}
    (expected, _), *_ = run_ranks(losses, ranks, low(**changes))
    assert found[0] == expected[0] and found != expected
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=2e-3)


def tied_copies(world, config):
    """Return every copy of the tied weight's masters and moments on this rank after some steps."""
    engine: Any = build_engine(config, world)
    train(engine, config, 0, 1, 1, 4)
    copies = [held.master for held in engine.held if held.name == "embed.weight"]
    moments = [engine.optimizer.state[copy][name].float() for copy in copies for name in ("exp_avg", "exp_avg_sq")]
    return [tensor.detach().tolist() for tensor in (*copies, *moments)]


@pytest.mark.parametrize("schedule", ["1f1b", "zbv_zero_bubble"])
def test_both_copies_of_a_tied_weight_are_rounded_equally(schedule):
    """On two stages, of two ranks or of one (the V): otherwise they would diverge, and a checkpoint keeps only one."""
    config = layout_job(family="gpt2", pp=2, schedule=schedule, virtual_stages=1 + (schedule != "1f1b"))
    config.precision.name, config.optim.moments = "bf16", "bf16"
    check(config, 2)
    first, last = run_ranks(tied_copies, 2, config)
    if schedule == "1f1b":
        assert len(first) == 3 and first == last
    else:
        assert len(first) == 6 and first[0] == first[1] and first[2:4] == first[4:] and last == []


def moments(world, config):
    """Return this rank's checkpoint state after a step whose gradients are the same in any layout."""
    engine: Any = build_engine(config, world)
    for held in engine.held:
        numbers = torch.arange(held.first_element, held.first_element + held.master.numel()).view(held.sizes)
        held.master.grad = torch.sin(numbers.float())
    engine.optimizer.train_step = 3
    engine.optimizer.step()
    return {
        held.name: (held.first_element, engine.optimizer.state[held.master]["exp_avg_sq"].float().flatten().tolist())
        for held in engine.held
    }


def test_pieces_of_rows_are_rounded_like_whole_rows():
    """Two ranks of ZeRO-3 with pieces of unequal size."""
    (whole,) = run_ranks(moments, 1, low("bf16"))
    for part in run_ranks(moments, 2, low("bf16", zero=3)):
        for name, (first, values) in part.items():
            assert values == whole[name][1][first : first + len(values)], name
        assert sum(len(values) for _, values in part.values()) < sum(len(values) for _, values in whole.values())


NUDGES = 50


def nudged(world, config):
    """Return this rank's second moments after many steps that each add less than half a unit in the last place.

    They start at 1, every gradient is 2 and beta2 is 0.999, so each step adds 0.003 where neighbouring bf16
    values are 0.0078 apart.
    """
    engine: Any = build_engine(config, world)
    for held in engine.held:
        engine.optimizer.state[held.master]["exp_avg_sq"].fill_(1.0)
    for step in range(1, NUDGES + 1):
        for held in engine.held:
            held.master.grad = torch.full_like(held.master, 2.0)
        engine.optimizer.train_step = step
        engine.optimizer.step()
    return torch.cat([engine.optimizer.state[held.master]["exp_avg_sq"].float().flatten() for held in engine.held])


@pytest.mark.parametrize(("ranks", "changes"), [(1, {}), (2, {"zero": 3})], ids=str)
def test_changes_too_small_for_bf16_add_up_over_the_steps(ranks, changes):
    """The mean equals that of exact arithmetic. Rounded to nearest, every moment would stay at 1 forever."""
    config = low("bf16", **changes)
    config.optim.betas = [0.9, 0.999]
    exact = 4.0 - 3.0 * 0.999**NUDGES
    for found in run_ranks(nudged, ranks, config):
        assert found.numel() > 1000
        assert found.mean().item() == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(("ranks", "changes"), [(1, {}), (2, {"zero": 2})], ids=str)
def test_a_resume_with_bf16_moments_is_the_run_that_never_stopped(ranks, changes, tmp_path):
    config = low("bf16", **changes)
    (whole, _), *_ = run_ranks(losses, ranks, config)
    run_ranks(losses, ranks, config, tmp_path, 1, 6)
    (again, _), *_ = run_ranks(losses, ranks, config, tmp_path, 7, 12)
    assert again == whole[6:]


@pytest.mark.parametrize(("saved", "resumed"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_run_may_change_the_format_of_its_moments(saved, resumed, tmp_path):
    run_ranks(losses, 1, low(saved), tmp_path, 1, 6)
    ((same, _),) = run_ranks(losses, 1, low(saved), tmp_path, 7, 12)
    ((other, _),) = run_ranks(losses, 1, low(resumed), tmp_path, 7, 12)
    assert [loss for loss, _ in other] == pytest.approx([loss for loss, _ in same], rel=2e-3)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, {"zero": 3}),
        (2, {"pp": 2}),
        (1, {"recompute": "selective"}),
        pytest.param(1, {"compile": True}, marks=pytest.mark.slow_build),
    ],
    ids=str,
)
def test_losses_in_fp8_stay_near_those_in_bf16(ranks, changes):
    """fp8 is emulated on a CPU; the losses must differ, or nothing was rounded."""
    config = low(precision="fp8", **changes)
    check(config, ranks)
    (found, _), *_ = run_ranks(losses, ranks, config, timeout_s=300)
    (expected, _), *_ = run_ranks(losses, ranks, low(**changes), timeout_s=300)
    assert found != expected
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-2)
    assert found[0][0] == pytest.approx(expected[0][0], rel=2e-3)


def test_layers_unsuitable_for_fp8_products_stay_in_bf16():
    """A feed-forward layer of width 37."""
    from megatrain.model.fp8 import use_fp8
    from megatrain.model.init import build_model

    model = build_model(job(model=llama(hidden_size=32, head_size=8)).model, seed=1)
    names = [name for name, _ in model.named_parameters()]
    use_fp8(model.blocks, torch.device("cpu"))
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
    assert kinds["blocks.0.attn.q"] == "Float8Linear" and kinds["blocks.1.mlp.down"] == "Linear"
    assert kinds["head"] == "Head" and names == [name for name, _ in model.named_parameters()]

"""What every engine guarantees beyond equal losses: evaluation, state, counters, fp16 and memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.jobs import SEQ_LEN, VOCAB, batches, gather, job, llama, train
from support.ranks import run_ranks

from megatrain.data.batch import MicroBatch
from megatrain.engine.build import build_engine
from megatrain.errors import EnvironmentFault
from megatrain.kernels import IGNORE_INDEX
from megatrain.model.count import parameter_shapes
from megatrain.optim.loss_scale import LossScaler

ENGINES = [("native", 0, 1), ("deepspeed", 0, 2), ("deepspeed", 1, 2), ("deepspeed", 2, 2), ("deepspeed", 3, 2)]


def score(world, config):
    """Evaluate between two steps: a ragged set of 5 sequences, padded to equal calls on every rank."""
    engine = build_engine(config, world)
    engine.train_step(batches(config, 1, world.rank, world.size), 1e-3, 1)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (5, SEQ_LEN + 1), generator=generator)
    padded = torch.zeros(8, SEQ_LEN + 1, dtype=torch.int64)
    padded[:5] = ids
    labels = padded[:, 1:].clone()
    labels[5:] = IGNORE_INDEX
    share = 8 // world.size
    rows = slice(world.rank * share, (world.rank + 1) * share)
    held = [MicroBatch(padded[rows, :-1].contiguous(), labels[rows].contiguous())]
    loss_sum, tokens = engine.evaluate(held)
    again, _ = engine.evaluate(held)
    after = engine.train_step(batches(config, 2, world.rank, world.size), 1e-3, 2)
    return float(loss_sum), int(tokens), float(again), float(after.loss_sum)


@pytest.mark.parametrize(("engine", "zero", "ranks"), ENGINES)
def test_evaluation_is_global_and_leaves_training_alone(engine, zero, ranks):
    """It sums over all ranks and counts only real labels; dropout is off during it and on again afterwards."""
    config = job(engine, zero, micro=4, model=llama(dropout=0.3))
    results = run_ranks(score, ranks, config)
    assert len(set(results)) == 1, "ranks disagree"
    loss_sum, tokens, again, after = results[0]
    assert tokens == 5 * SEQ_LEN and loss_sum == again
    assert loss_sum / tokens == pytest.approx(math.log(VOCAB), rel=0.05)
    undisturbed = run_ranks(two_steps, ranks, config)[0]
    assert after == undisturbed


def two_steps(world, config):
    engine = build_engine(config, world)
    engine.train_step(batches(config, 1, world.rank, world.size), 1e-3, 1)
    return float(engine.train_step(batches(config, 2, world.rank, world.size), 1e-3, 2).loss_sum)


def describe(world, config, folder):
    engine = build_engine(config, world)
    train(engine, config, world.rank, world.size, 1, 2)
    return {name: tuple(t.shape) for name, t in gather(engine, Path(folder), world).items()}, engine.counters()


@pytest.mark.parametrize(("engine", "zero", "ranks"), ENGINES)
def test_state_has_single_device_names_and_whole_shapes(engine, zero, ranks, tmp_path):
    """`model.<name>` and both moments for every parameter of the single-device model; groups list them by name."""
    config = job(engine, zero)
    shapes, counters = run_ranks(describe, ranks, config, str(tmp_path))[0]
    expected = parameter_shapes(config.model)
    kinds = ("model.", "optim.exp_avg.", "optim.exp_avg_sq.")
    assert shapes == {f"{kind}{name}": shape for kind in kinds for name, shape in expected.items()}
    assert counters.optimizer.step == 2 and counters.loss_scale is None
    groups = counters.optimizer.groups
    assert set(groups["decay"].parameters) == {name for name, shape in expected.items() if len(shape) > 1}
    assert set(groups["no_decay"].parameters) == {name for name, shape in expected.items() if len(shape) == 1}
    assert groups["decay"].settings["weight_decay"] == 0.1 and groups["no_decay"].settings["weight_decay"] == 0.0


def decay_only(world, config, folder):
    """Run one step with negligible gradients, so that only the decay moves a parameter."""
    engine = build_engine(config, world)
    before = gather(engine, Path(folder) / "before", world)
    zeroed = [replace(b, loss_weights=torch.zeros(b.labels.shape)) for b in batches(config, 1, world.rank, world.size)]
    engine.train_step(zeroed, 1e-2, 1)
    return before, gather(engine, Path(folder) / "after", world)


@pytest.mark.parametrize(("engine", "zero", "ranks"), ENGINES)
def test_only_matrices_decay(engine, zero, ranks, tmp_path):
    """With zero gradients matrices shrink by lr x decay and vectors stay as they are."""
    before, after = run_ranks(decay_only, ranks, job(engine, zero), str(tmp_path))[0]
    for key, tensor in before.items():
        if key.startswith("model."):
            factor = 1.0 if tensor.dim() == 1 else 1.0 - 1e-2 * 0.1
            assert torch.allclose(after[key], tensor * factor, rtol=1e-6, atol=1e-9), key


def overflow(world, config, allow):
    """Train in fp16 at a scale that overflows at first; return the scale, whether each step updated, and the losses."""
    # do not depend on this CPU: without fast fp16 DeepSpeed refuses it, although the arithmetic works
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: allow
    engine = build_engine(config, world)
    seen = []
    for step in range(1, 13):
        result = engine.train_step(batches(config, step, world.rank, world.size), 1e-3, step)
        loss = float(result.loss_sum) / int(result.tokens)
        seen.append((bool(result.updated), float(result.aux["loss_scale"]), loss, float(result.grad_norm)))
    return seen, engine.counters()


@pytest.mark.parametrize(
    ("engine", "zero", "ranks"), [("native", 0, 1), ("deepspeed", 1, 2), ("deepspeed", 2, 2), ("deepspeed", 3, 2)]
)
def test_fp16_follows_one_loss_scale_rule(engine, zero, ranks):
    """Overflowing steps are skipped and move nothing, the scale moves by the one rule, and both are saved."""
    config = job(engine, zero, precision="fp16")
    config.precision.initial_loss_scale, config.precision.loss_scale_window = 2.0**22, 3
    seen, counters = run_ranks(overflow, ranks, config, True)[0]
    rule = LossScaler.from_config(config.precision)
    for updated, scale, _, norm in seen:
        rule.update(overflow=not updated)
        assert scale == rule.scale
        assert (math.isfinite(norm) and norm < 10) == updated, "the norm is reported unscaled"
    good = [entry for entry in seen if entry[0]]
    assert not seen[0][0] and len(good) >= 4, "the first step overflows, most later ones do not"
    assert len({scale for _, scale, *_ in seen}) >= 2
    assert counters.loss_scale == rule.state()
    assert counters.optimizer.step == len(good)
    assert good[-1][2] < good[0][2] + 0.05


def test_fp16_without_a_device_for_it_is_refused():
    """On a CPU without fp16 arithmetic DeepSpeed's refusal names what works."""
    config = job("deepspeed", 1, precision="fp16")

    with pytest.raises(AssertionError, match=r"EnvironmentFault.*precision=bf16") as caught:
        run_ranks(overflow, 1, config, False)
    assert EnvironmentFault.exit_code == 8 and caught


def test_zero3_never_holds_the_whole_model():
    """Construction cuts each parameter as soon as it exists: a rank of four peaks at well under the model's size."""
    program = (
        Path(__file__).parents[1] / "support" / "construction.py"
    )  # in a new interpreter, because memory left by other tests would count
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for peak, kept in found["ranks"]:
        assert kept == pytest.approx(found["whole"] / 4, rel=0.02)
        assert peak < 0.6 * found["whole"]

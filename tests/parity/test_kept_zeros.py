"""What is tuned of a 2:4 model stays 2:4, exactly, and is the same in every engine and layout (optim.keep_zeros)."""

from __future__ import annotations

import pytest
import torch
from support import jobs
from support.jobs import compare, layout_job, parity_steps, rows
from support.ranks import run_ranks

from megatrain.checkpoint.piece import Piece
from megatrain.compress.prune import two_of_four
from megatrain.engine import build
from megatrain.model.count import parameter_shapes
from megatrain.model.init import initial_block
from megatrain.model.quantized import is_quantizable

LAYOUTS = [
    (2, {"engine": "deepspeed", "zero": 3}),
    (2, {"engine": "deepspeed", "zero": 1}),
    (2, {"engine": "deepspeed", "tp": 2}),
    (4, {"tp": 2, "pp": 2}),
]


def pruned(config):
    """The weights of the blocks as they begin, pruned: by name."""
    found = {}
    for name, shape in parameter_shapes(config.model).items():
        if is_quantizable(name, shape):
            whole = initial_block(config.model, name, shape, config.seed, (0, 0), shape).view(shape)
            found[name] = two_of_four(whole) if shape[1] % 4 == 0 else whole
    return found


def steps(world, config, folder):
    """Run `parity_steps` from pruned weights."""
    build_engine = build.build_engine

    def building(config, world):
        engine = build_engine(config, world)
        state = engine.state()
        for name, whole in pruned(config).items():
            if (held := state.get(f"model.{name}")) is None:
                continue
            for offsets, sizes, part in held.parts if isinstance(held, Piece) else [((0, 0), whole.shape, held)]:
                part.copy_(whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))])
        engine.restore(None)
        return engine

    jobs.build_engine = building
    return parity_steps(world, config, folder)


def job_of(**settings):
    config = layout_job(**settings)
    config.optim.keep_zeros, config.optim.weight_decay = True, 0.1
    return config


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(steps, 1, job_of(micro=2), str(tmp_path_factory.mktemp("alone")))[0]


def assert_pattern_is_kept(states, config):
    changed = 0
    for name, before in pruned(config).items():
        after = states[-1][f"model.{name}"]
        assert torch.equal(after == 0, before == 0), name
        changed += int((after != before).sum())
    assert changed > 1000


def test_the_pattern_holds_exactly(alone):
    assert_pattern_is_kept(alone[2], job_of(micro=2))


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_every_layout_gives_the_same(ranks, changes, alone, tmp_path):
    config = job_of(micro=rows(changes, ranks), **changes)
    results = run_ranks(steps, ranks, config, str(tmp_path))
    compare(results, alone)
    assert_pattern_is_kept(results[0][2], config)


@pytest.mark.parametrize(
    "precision", [{"name": "bf16", "accumulate_dtype": "fp32"}, {"name": "fp32", "moments": "bf16"}], ids=str
)
def test_the_pattern_holds_in_low_precision(precision, tmp_path):
    config = job_of(micro=2)
    config.optim.moments = precision.pop("moments", "fp32")
    for name, value in precision.items():
        setattr(config.precision, name, value)
    assert_pattern_is_kept(run_ranks(steps, 1, config, str(tmp_path))[0][2], config)

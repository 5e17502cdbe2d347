"""An engine that has trained returns to a checkpoint in place and is then bit-equal to the engine that saved it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.jobs import batches, gather, layout_job
from support.ranks import run_ranks
from support.records import at

from megatrain.checkpoint.store import CheckpointStore
from megatrain.engine.build import build_engine
from megatrain.parallel.layout import Layout
from megatrain.training.origin import Origin, load_origin

LAYOUTS = [
    (1, {}),
    (2, {"zero": 3}),
    (1, {"precision": "fp16"}),
    (2, {"pp": 2, "family": "gpt2"}),
    (2, {"tp": 2}),
    (2, {"engine": "deepspeed", "zero": 1, "precision": "bf16"}),
    (2, {"engine": "deepspeed", "zero": 3}),
]


def there_and_back(world, config, folder):
    """Run three steps, save, run five more, go back in place and repeat three of them; return both histories."""
    engine, layout = build_engine(config, world), Layout.of(config, world.size)
    store = CheckpointStore(Path(folder) / "checkpoints", world)

    def steps(name, numbers, factor=1.0):
        told = []
        for step in numbers:
            data = batches(config, step, layout.dp_rank(world.rank), layout.dp)
            result = engine.train_step(data, config.optim.lr * factor, step)
            told.append((float(result.loss_sum), float(result.grad_norm), bool(result.updated)))
        return (
            told,
            gather(engine, Path(folder) / name, world),
            engine.counters(),
        )

    steps("start", range(1, 4))
    store.save(engine.state(), at(3, engine.counters()))
    first = steps("first", range(4, 7))
    steps("beyond", range(7, 9), factor=30.0)
    folder_saved, manifest = store.newest_valid(before=7)
    load_origin(Origin(folder_saved, manifest, resumes=True), engine, world)
    return first, steps("again", range(4, 7))


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_going_back_in_place_leaves_no_trace(ranks, changes, tmp_path):
    """Three steps later, losses, norms, parameters, moments, the optimizer's step and the loss scale are equal."""
    changes = dict(changes)
    precision = changes.pop("precision", "fp32")
    config = layout_job(micro=4, **changes)
    config.precision.name = precision
    config.precision.loss_scale_window = 2
    for (told, state, counters), (again, state_again, counters_again) in run_ranks(
        there_and_back, ranks, config, str(tmp_path)
    ):
        assert again == told and counters_again == counters
        assert all(torch.equal(tensor, state_again[key]) for key, tensor in state.items())

"""A run on a mixture is the same run in every layout: samples, losses, and the held-out loss of each source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.jobs import SEQ_LEN, VOCAB, layout_job, rows
from support.ranks import run_ranks

from megatrain.data.card import Card, card_of_written, fingerprint
from megatrain.data.indexed import IndexedWriter
from megatrain.resilience.owner import Ownership
from megatrain.resilience.signals import StopRequest
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import read_metrics
from megatrain.training.datasets import open_data
from megatrain.training.job import RankJob

CELLS = [
    (2, "llama", {"zero": 3}),
    (2, "gpt2", {"tp": 2}),
    (2, "llama", {"cp": 2, "zero": 1}),
    (2, "gpt2", {"pp": 2}),
    (4, "llama", {"tp": 2, "zero": 2}),
    (2, "gpt2", {"engine": "deepspeed", "zero": 3}),
    (2, "llama", {"engine": "deepspeed", "tp": 2, "zero": 1}),
]
STEPS = 4


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Three datasets of random ids, of which the smallest is read more than once."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, tokens) in enumerate({"web": 3000, "code": 1500, "talk": 5 * SEQ_LEN + 1}.items()):
        generator, cards = np.random.default_rng(seed), {}
        (folder / name).mkdir()
        for split, count in (("train", tokens), ("heldout", 6 * SEQ_LEN + 3)):
            writer = IndexedWriter(folder / name / split, np.dtype(np.uint16))
            ids = generator.integers(0, VOCAB, count).astype(np.uint16)
            writer.add(ids, np.array([count], np.int32))
            writer.finish()
            cards[split] = card_of_written(writer, 2 * count)
        Card(name=name, fingerprint=fingerprint(cards), splits=cards, tokenizer=None).save(folder / name)
    return folder


def mixed_job(datasets, runs, micro=8, **changes):
    """Return the config of a run whose mixture changes inside of it."""
    config = layout_job(micro=micro, **changes)
    config.run.name, config.run.dir, config.tracking.name = "mixed", str(runs), "none"
    config.data.kind, config.data.name, config.data.dir = "mixture", "three", str(datasets)
    config.data.mixture = {"web": 0.6, "code": 0.25, "talk": 0.15}
    config.data.phases = [{"from_step": 3, "mixture": {"web": 0.2, "code": 0.8}}]
    config.train.steps, config.train.eval_every = STEPS, 2
    return config


def run_job(world, config):
    """Run one rank of a whole training job."""
    data = open_data(config)
    owner = Ownership.take(Path(config.run.dir) / str(config.run.name)) if world.is_main else None
    return RankJob(data, world, StopRequest(), owner, 0, None).run()


def records(config, ranks):
    """Run a job; return its metrics and what it has read of each source."""
    assert run_ranks(run_job, ranks, config) == ["done"] * ranks
    folder = Path(config.run.dir) / str(config.run.name)
    seen = [event["sources"] for event in read_events(folder / "events.jsonl") if event["kind"] == "mixture"]
    return read_metrics(folder / "metrics.jsonl"), seen


@pytest.fixture(scope="module")
def one_process(datasets, tmp_path_factory):
    """Return a function that runs the job on one process, once for each family."""
    known = {}

    def get(family):
        if family not in known:
            known[family] = records(mixed_job(datasets, tmp_path_factory.mktemp("one"), family=family), 1)
        return known[family]

    return get


@pytest.mark.parametrize(("ranks", "family", "changes"), CELLS)
def test_a_mixture_is_read_and_learnt_as_on_one_process(ranks, family, changes, datasets, one_process, tmp_path):
    """Samples and shares are equal; losses agree within 1e-5, norms within 1e-4, as without a mixture."""
    config = mixed_job(datasets, tmp_path, rows(changes, ranks), family=family, **changes)
    (found, seen), (expected, expected_seen) = records(config, ranks), one_process(family)
    assert [record["batch_hash"] for record in found] == [record["batch_hash"] for record in expected]
    assert seen == expected_seen and seen[0]["talk"]["epochs"] > 0.5
    for record, true in zip(found, expected, strict=True):
        assert record["loss"] == pytest.approx(true["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(true["grad_norm"], rel=1e-4)
    sources = [f"heldout_loss/{name}" for name in ("web", "code", "talk")]
    for at in (1, 3):
        for key in ("heldout_loss", *sources):
            assert found[at][key] == pytest.approx(expected[at][key], rel=1e-5)
        assert len({found[at][key] for key in sources}) == 3
        mean = 0.6 * found[at][sources[0]] + 0.25 * found[at][sources[1]] + 0.15 * found[at][sources[2]]
        assert found[at]["heldout_loss"] == pytest.approx(mean, rel=1e-6)

"""Learning from preferences gives the same losses, metrics and parameters in every engine and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import jobs
from support.jobs import END_OF_DOCUMENT, GLOBAL_BATCH, SEQ_LEN, VOCAB, compare, layout_job, parity_steps, rows
from support.ranks import run_ranks

from megatrain.data.loader import micro_batch_of, padded_ids
from megatrain.data.samples import Sample
from megatrain.engine import build
from megatrain.optim.preferences import DirectPreference, PairReward, ReferenceTable

LAYOUTS = [
    (2, {"engine": "deepspeed", "zero": 3}),
    (2, {"engine": "deepspeed", "tp": 2}),
    (2, {"zero": 2}),
    (2, {"cp": 2, "cp_kind": "ring"}),
    (4, {"tp": 2, "pp": 2}),
    (2, {"pp": 2, "schedule": "zbv_zero_bubble", "virtual_stages": 2}),
]
PAIRS_A_ROW = 2
REFERENCE = torch.randn(GLOBAL_BATCH * PAIRS_A_ROW, 2, generator=torch.Generator().manual_seed(1)) - 10


def pairs(config, step, rank, ranks, ignored=False):
    """Return one rank's micro-batches of a step: two pairs a row, of uneven lengths, prompts masked, and padding."""
    draw = np.random.default_rng(step)
    samples = []
    for row in range(GLOBAL_BATCH):
        lengths = draw.integers(3, 5, 2 * PAIRS_A_ROW)
        ids = draw.integers(6, VOCAB, lengths.sum())
        counts = np.ones(len(ids), bool)
        ends = np.cumsum(lengths)
        ids[ends - 1], counts[ends - 1], counts[ends - lengths] = END_OF_DOCUMENT, False, False
        numbers = np.arange(row * PAIRS_A_ROW, (row + 1) * PAIRS_A_ROW)
        samples.append(Sample(ids, lengths.tolist(), counts=counts, pairs=numbers))
    size = config.train.micro_batch_size
    ids = padded_ids(samples, SEQ_LEN)
    starts = range(rank * size, GLOBAL_BATCH, ranks * size)
    parts = [slice(start, start + size) for start in starts]
    return [micro_batch_of(samples[part], ids[part], END_OF_DOCUMENT, True) for part in parts]


DPO = DirectPreference(0.1, 0.1, 0.5, ReferenceTable(REFERENCE))
OBJECTIVES = {"dpo": DPO, "reward": PairReward(0.2, 0.1)}


def job_of(method, **settings):
    """Return the config of a job that learns by a method; a reward model has scores, and a tied embedding unused."""
    config = layout_job(**settings)
    config.train.mask_documents = True
    if method == "reward":
        config.model.output, config.model.tie_embeddings = "score", True
    return config


def steps(world, config, folder, method):
    """Run `parity_steps` on pairs; return also an evaluation's metrics and recorded log-probabilities."""
    build_engine, made = build.build_engine, []

    def building(config, world):
        made.append(build_engine(config, world, OBJECTIVES[method]))
        return made[0]

    jobs.build_engine, jobs.batches = building, pairs
    results = parity_steps(world, config, folder)
    layout = jobs.Layout.of(config, world.size)
    mine = pairs(config, 7, layout.dp_rank(world.rank), layout.dp)
    scalars = {name: float(value) for name, value in made[0].measure(mine).scalars.items()}
    recorded = None
    if method == "dpo":
        with DPO.reference.recording(len(REFERENCE), world.device) as found:
            made[0].measure(mine)
            found = world.all_reduce_sum(found)
            recorded = (found[:, :2] / found[:, 2:]).tolist()
    return results, scalars, recorded


@pytest.fixture(scope="module", params=list(OBJECTIVES))
def alone(request, tmp_path_factory):
    config = job_of(request.param, micro=2)
    return request.param, run_ranks(steps, 1, config, str(tmp_path_factory.mktemp("alone")), request.param)[0]


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_every_layout_gives_the_same(ranks, changes, alone, tmp_path):
    method, (expected, scalars, recorded) = alone
    config = job_of(method, micro=rows(changes, ranks), **changes)
    results = run_ranks(steps, ranks, config, str(tmp_path), method)
    compare([result for result, _, _ in results], expected)
    assert 0 < scalars["accuracy"] < 1
    for _, found, log_probs in results:
        assert found == pytest.approx(scalars, rel=1e-4, abs=1e-6)
        if recorded is not None:
            np.testing.assert_allclose(log_probs, recorded, rtol=1e-5)


def test_a_reward_model_with_low_rank_layers_learns_its_score_in_both_engines(tmp_path):
    found = []
    for ranks, changes in [(1, {"micro": 2}), (2, {"engine": "deepspeed", "zero": 3}), (2, {"tp": 2})]:
        config = job_of("reward", **{"micro": rows(changes, ranks), **changes})
        config.method.lora.rank = 3
        results = run_ranks(steps, ranks, config, str(tmp_path / str(len(found))), "reward")
        found.append([result for result, _, _ in results])
    for other in found[1:]:
        compare(other, found[0][0])
    start, _, end = found[0][0][2]
    changed = {name for name in start if name.startswith("model.") and not torch.equal(start[name], end[name])}
    assert {name for name in changed if "lora_" not in name} == {"model.score.weight"}

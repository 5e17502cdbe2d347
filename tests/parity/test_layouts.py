"""Any legal layout gives the result of one process: losses, norms, first gradients, parameters, held-out losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jobs import batches, gather, layout_job
from ranks import run_ranks

from megatrain.engine.build import build_engine
from megatrain.parallel.layout import Layout, check

STEPS = 10
INTERLEAVED = {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_1f1b"}
SPLIT = {"pp": 2, "virtual_stages": 2, "schedule": "interleaved_zero_bubble"}
V = {"pp": 2, "virtual_stages": 2, "schedule": "zbv_zero_bubble"}

CELLS = [
    (2, "llama", {"zero": 0}),
    (2, "llama", {"zero": 1}),
    (2, "gpt2", {"zero": 2}),
    (2, "gpt2", {"zero": 3}),
    (4, "llama", {"zero": 3, "dp_replicate": 2}),
    (2, "llama", {"tp": 2}),
    (2, "gpt2", {"tp": 2, "recompute": "selective"}),
    (4, "llama", {"tp": 4}),
    (4, "gpt2", {"tp": 2, "zero": 0}),
    (4, "llama", {"tp": 2, "zero": 3, "recompute": "full"}),
    (2, "llama", {"cp": 2, "zero": 3}),
    (2, "gpt2", {"cp": 2, "zero": 1, "cp_kind": "ring"}),
    (4, "llama", {"cp": 4, "cp_kind": "ring", "zero": 2}),
    (4, "llama", {"cp": 2, "tp": 2, "zero": 2}),
    (4, "gpt2", {"cp": 2, "zero": 3, "recompute": "full"}),
    (2, "gpt2", {"pp": 2}),
    (2, "llama", {"pp": 2, "schedule": "gpipe", "layers_per_stage": [1, 4]}),
    (4, "llama", {"pp": 4}),
    (4, "gpt2", {"pp": 2, "zero": 3, "recompute": "full"}),
    (4, "llama", {**INTERLEAVED, "zero": 2}),
    (4, "gpt2", {**SPLIT, "zero": 3}),
    (4, "gpt2", {**V, "zero": 3}),
    (4, "llama", {**V, "zero": 1}),
    (4, "gpt2", {"pp": 2, "tp": 2}),
    (4, "llama", {"pp": 2, "cp": 2, "zero": 3}),
    (2, "llama", {"engine": "deepspeed", "cp": 2, "zero": 3}),
    (2, "gpt2", {"engine": "deepspeed", "cp": 2, "zero": 0, "recompute": "full"}),
    (4, "llama", {"engine": "deepspeed", "cp": 2, "zero": 2, "cp_kind": "ring"}),
    (4, "gpt2", {"engine": "deepspeed", "cp": 2, "zero": 1}),
    (8, "gpt2", {"pp": 2, "tp": 2, "zero": 3}),
]


def run(world, config, folder):
    """Ten steps with unevenly many ignored labels; what each rank was told, and the gathered state on the way."""
    engine = build_engine(config, world)
    layout = Layout.of(config, world.size)

    def data(step):
        return batches(config, step, layout.data_rank(world.rank), layout.dp, ignored=True)

    told, states = [], [gather(engine, Path(folder) / "start", world)]
    for step in range(1, STEPS + 1):
        result = engine.train_step(data(step), config.optim.lr, step)
        told.append((float(result.loss_sum) / int(result.tokens), float(result.grad_norm), int(result.tokens)))
        if step in (1, STEPS):
            states.append(gather(engine, Path(folder) / str(step), world))
    loss_sum, tokens = engine.evaluate(data(99))
    return told, (float(loss_sum) / int(tokens), int(tokens)), states if world.rank == 0 else None


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The same steps on one process, for each family."""
    known = {}

    def get(family):
        if family not in known:
            folder = str(tmp_path_factory.mktemp("one"))
            known[family] = run_ranks(run, 1, layout_job(family=family, micro=8), folder)[0]
        return known[family]

    return get


def compare(results, expected):
    """Losses within 1e-5 of one process, norms 1e-4, first gradients 1e-5 of a parameter's largest, parameters 1e-5 absolute
    (key biases apart: their true gradient is zero), the same start to the bit; and every rank is told the same."""
    told, held_out, states = results[0]
    true_told, true_held_out, true_states = expected
    assert all(other[:2] == (told, held_out) for other in results[1:])
    for (loss, norm, tokens), (true_loss, true_norm, true_tokens) in zip(told, true_told, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5) and norm == pytest.approx(true_norm, rel=1e-4)
        assert tokens == true_tokens
    assert held_out == pytest.approx(true_held_out, rel=1e-5)
    (start, first, end), (true_start, true_first, true_end) = states, true_states
    assert start.keys() == true_start.keys()
    for key, tensor in true_start.items():
        assert torch.equal(start[key], tensor), f"{key} starts from other bits"
        if key.endswith("k.bias"):
            continue
        if key.startswith("optim.exp_avg."):  # after one step this is the clipped gradient, times 1 - beta1
            limit = 1e-5 * true_first[key].abs().max()
            assert (first[key] - true_first[key]).abs().max() <= limit, f"first gradient: {key}"
        if key.startswith("model."):
            assert torch.allclose(end[key], true_end[key], rtol=0, atol=1e-5), key


@pytest.mark.parametrize(("ranks", "family", "changes"), CELLS, ids=str)
def test_a_layout_gives_the_result_of_one_process(ranks, family, changes, one_process, tmp_path):
    config = layout_job(family=family, **changes)
    check(config, ranks)
    compare(run_ranks(run, ranks, config, str(tmp_path), timeout_s=300), one_process(family))


@pytest.mark.parametrize(
    ("ranks", "changes"), [(2, {"tp": 2}), (2, {"zero": 3}), (2, {"pp": 2}), (4, {"tp": 2, "zero": 3})], ids=str
)
def test_compiled_blocks_give_the_result_of_one_process(ranks, changes, one_process, tmp_path):
    """A compiled block behind a tensor-parallel embedding once gave silently wrong gradients."""
    config = layout_job(compile=True, **changes)
    compare(run_ranks(run, ranks, config, str(tmp_path), timeout_s=500), one_process("llama"))


@pytest.mark.parametrize(
    ("ranks", "changes"), [(2, {"tp": 2}), (2, {"cp": 2}), (4, {"pp": 2, "zero": 3, "recompute": "full"})], ids=str
)
def test_dropout_repeats_bit_for_bit(ranks, changes, one_process, tmp_path):
    """Two runs of one layout with dropout are the same to the bit, and not those without."""
    config = layout_job(**changes)
    config.model.dropout = 0.2
    first, again = (run_ranks(run, ranks, config, str(tmp_path / name))[0] for name in ("first", "again"))
    assert first[:2] == again[:2]
    assert all(torch.equal(tensor, again[2][-1][key]) for key, tensor in first[2][-1].items())
    assert first[0] != one_process("llama")[0]

"""Every engine and ZeRO stage gives the losses, norms and parameters of one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.jobs import GLOBAL_BATCH, batches, gather, gpt2, job, llama, train
from support.ranks import run_ranks

from megatrain.engine.build import build_engine

STEPS = 6
MODELS = {"llama": llama(), "llama_tied_qk_norm": llama(tie_embeddings=True, qk_norm=True), "gpt2": gpt2()}


def run(world, config, folder=None, steps=STEPS, ignored=False):
    engine = build_engine(config, world)
    start = gather(engine, Path(folder) / "start", world) if folder else None
    seen = train(engine, config, world.rank, world.size, 1, steps, ignored)
    end = gather(engine, Path(folder) / "end", world) if folder else None
    return seen, start, end


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Run one native process with micro-batches of 8, for each model."""
    known = {}

    def get(name, ignored=False):
        if (name, ignored) not in known:
            config = job(engine="native", zero=0, micro=8, model=MODELS[name])
            folder = str(tmp_path_factory.mktemp("reference"))
            known[name, ignored] = run_ranks(run, 1, config, folder, STEPS, ignored)[0]
        return known[name, ignored]

    return get


LAYOUTS = [(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 3)]
CELLS = [(ranks, zero, "llama") for ranks, zero in LAYOUTS] + [
    (2, zero, name) for name in ("llama_tied_qk_norm", "gpt2") for zero in (2, 3)
]


@pytest.mark.parametrize(("ranks", "zero", "name"), CELLS)
def test_any_stage_on_any_ranks_equals_one_process(ranks, zero, name, reference, tmp_path):
    """2 ranks x micro batch 4 equals 1 rank x micro batch 8: losses within 1e-5 relative at each of 6 steps, gradient
    norms within 1e-4, parameters after them within 1e-5 (key biases apart: their true gradient is zero)."""
    seen, start, end = run_ranks(run, ranks, job(zero=zero, model=MODELS[name]), str(tmp_path))[0]
    expected, first, last = reference(name)
    for (loss, norm), (true_loss, true_norm) in zip(seen, expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)
    for key, tensor in first.items():
        assert torch.equal(tensor, start[key]), f"{key} starts from other bits"
    for key, tensor in last.items():
        if key.startswith("model.") and not key.endswith("k.bias"):
            assert torch.allclose(tensor, end[key], rtol=0, atol=1e-5), key


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_loss_is_the_mean_over_all_tokens_of_the_step(zero, reference):
    """An uneven number of ignored labels on the ranks changes nothing: the mean is over tokens, not over ranks."""
    seen, _, _ = run_ranks(run, 2, job(zero=zero, micro=2), None, 5, True)[0]
    for (loss, norm), (true_loss, true_norm) in zip(seen, reference("llama", True)[0][:5], strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)


def test_accumulation_equals_one_large_micro_batch(reference):
    """Micro-batches of 1, 2 and 16 sequences give the losses of 8."""
    for micro in (1, 2, GLOBAL_BATCH):
        seen, _, _ = run_ranks(run, 1, job(engine="native", zero=0, micro=micro), None, 5)[0]
        assert [loss for loss, _ in seen] == pytest.approx([loss for loss, _ in reference("llama")[0][:5]], rel=1e-5)


@pytest.mark.parametrize(("engine", "zero", "ranks"), [("native", 0, 1), ("deepspeed", 2, 2), ("deepspeed", 3, 2)])
def test_recompute_changes_nothing(engine, zero, ranks):
    """Full and selective recompute give the same bits as no recompute, also with dropout."""
    model = llama(dropout=0.2)
    plain = run_ranks(run, ranks, job(engine, zero, model=model), None, 3)[0][0]
    again = run_ranks(run, ranks, job(engine, zero, model=model), None, 3)[0][0]
    assert plain == again
    for kind in (
        ("full",) if (engine, zero) == ("deepspeed", 3) else ("selective", "full")
    ):  # the table refuses the pair
        assert plain == run_ranks(run, ranks, job(engine, zero, model=model, recompute=kind), None, 3)[0][0], kind
    without = run_ranks(run, ranks, job(engine, zero, model=llama()), None, 3)[0][0]
    assert without != plain, "dropout did nothing"


@pytest.mark.parametrize(("engine", "zero", "ranks"), [("native", 0, 1), ("deepspeed", 0, 2), ("deepspeed", 2, 2)])
def test_compiled_blocks_give_the_same_losses(engine, zero, ranks):
    """Compiling each block changes a loss by no more than rounding."""
    plain, _, _ = run_ranks(run, ranks, job(engine, zero), None, 3)[0]
    config = job(engine, zero)
    config.compile = True
    compiled, _, _ = run_ranks(run, ranks, config, None, 3, timeout_s=300)[0]
    assert [loss for loss, _ in compiled] == pytest.approx([loss for loss, _ in plain], rel=1e-5)


LOW = [
    ("bf16", "fp32", "deepspeed", 1),
    ("bf16", "fp32", "deepspeed", 2),
    ("bf16", "fp32", "deepspeed", 3),
    ("bf16", "bf16", "deepspeed", 0),
    ("bf16", "fp32", "native", 0),
    ("bf16", "bf16", "native", 0),
    ("fp16", "fp32", "native", 0),
]


@pytest.mark.parametrize(("precision", "accumulate", "engine", "zero"), LOW)
def test_low_precision_trains_on_fp32_masters(precision, accumulate, engine, zero, reference, tmp_path):
    """bf16 and fp16 follow the fp32 losses within 5e-3 and the norms of four summed micro-batches within 5e-2, start
    from the same fp32 masters, and keep fp32 masters that the compute format could not hold."""
    config = job(engine, zero, precision=precision, accumulate=accumulate)
    seen, start, end = run_ranks(run, 1 if engine == "native" else 2, config, str(tmp_path), 5)[0]
    expected, first, _ = reference("llama")
    assert [loss for loss, _ in seen] == pytest.approx([loss for loss, _ in expected[:5]], rel=5e-3)
    assert [norm for _, norm in seen] == pytest.approx([norm for _, norm in expected[:5]], rel=5e-2), "sums were lost"
    assert all(torch.equal(tensor, start[key]) for key, tensor in first.items())
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    masters = end["model.blocks.0.mlp.up.weight"]
    assert not torch.equal(masters, masters.to(low).float())


@pytest.mark.parametrize(("engine", "zero", "ranks"), [("native", 0, 1), ("deepspeed", 0, 2), ("deepspeed", 3, 2)])
def test_clipping_uses_the_global_norm(engine, zero, ranks):
    """With a limit below the norm, the update is that of gradients scaled by limit / norm, the norm that of the whole
    model over all ranks; clipped and unclipped runs differ (Adam's epsilon is made large, else it would hide a
    scale)."""
    ends = []
    for limit in (0.0, 0.1):
        config = job(engine, zero)
        config.optim.grad_clip, config.optim.eps = limit, 1.0
        ends.append(run_ranks(run, ranks, config, None, 3)[0][0])
    assert ends[0][0] == ends[1][0], "the reported norm is the one before clipping"
    assert ends[0][2][0] != ends[1][2][0]
    reference = job("native", 0, micro=8)
    reference.optim.grad_clip, reference.optim.eps = 0.1, 1.0
    true = run_ranks(run, 1, reference, None, 3)[0][0]
    assert [loss for loss, _ in ends[1]] == pytest.approx([loss for loss, _ in true], rel=1e-6)
    assert math.isfinite(true[0][1]) and true[0][1] > 0.1


def ramp(world, config):
    """Run three steps of one micro-batch a rank, then three of four: the smallest and the full batch of a ramp."""
    engine = build_engine(config, world)
    seen = []
    for step in range(1, 7):
        every = batches(config, step, world.rank, world.size)
        result = engine.train_step(every[:1] if step <= 3 else every, config.optim.lr, step)
        seen.append((float(result.loss_sum) / int(result.tokens), float(result.grad_norm)))
    return seen


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_growing_batch_gives_the_steps_of_one_process(zero):
    """The number of micro-batches may change from step to step, whatever DeepSpeed's config said at the start."""
    expected = run_ranks(ramp, 1, job("native", 0, micro=4))[0]
    seen = run_ranks(ramp, 2, job("deepspeed", zero, micro=2))[0]
    for (loss, norm), (true_loss, true_norm) in zip(seen, expected, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        assert norm == pytest.approx(true_norm, rel=1e-4)

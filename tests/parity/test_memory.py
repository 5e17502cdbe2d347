"""The memory model compared with the tensors that the engines hold: planner/memory.py's formulas, rank by rank.

Parameters, gradients and optimizer states within 5% (in fact they are exact), activations within 3%. What is
there for a moment is only bounded: the instants that a test can look at need not be its largest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.holdings import held_in_a_step
from support.jobs import SEQ_LEN, VOCAB, layout_job, rows
from support.peak import peak_bytes
from support.ranks import run_ranks

from megatrain.config import ModelConfig
from megatrain.kernels.attention import document_mask
from megatrain.model.formats import FORMAT_BYTES
from megatrain.optim.slots import decays
from megatrain.parallel import plan
from megatrain.parallel.context import make_attend
from megatrain.parallel.layout import Layout
from megatrain.planner import activations
from megatrain.planner.memory import DeepSpeedSizes, MemoryModel

BUCKET = 1000
"""DeepSpeed's defaults would drown so small a model: its bucket of 5e8 numbers, and parameters that it never cuts."""
PATCH = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": BUCKET}

CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"precision": "bf16", "family": "gpt2"}),
    (1, {"precision": "bf16", "recompute": "selective"}),
    (1, {"recompute": "full", "micro": 4}),
    (1, {"engine": "deepspeed", "zero": 1, "precision": "bf16"}),
    (1, {"engine": "deepspeed", "zero": 3}),
    (2, {"zero": 0}),
    (2, {"zero": 1, "precision": "bf16", "family": "gpt2"}),
    (2, {"zero": 2}),
    (2, {"zero": 3, "precision": "bf16"}),
    (2, {"cp": 2, "zero": 3, "family": "gpt2"}),
    (2, {"cp": 2, "cp_kind": "ring", "precision": "bf16", "family": "gpt2"}),
    (2, {"cp": 2, "cp_kind": "ring", "seq_len": 512}),
    (2, {"cp": 2, "cp_kind": "ring", "seq_len": 512, "precision": "bf16", "recompute": "selective"}),
    (2, {"cp": 2, "cp_kind": "ring", "seq_len": 64, "documents": True}),
    (1, {"seq_len": 64, "window": 8}),
    (1, {"seq_len": 64, "documents": True, "family": "gpt2"}),
    (1, {"seq_len": 64, "documents": True, "precision": "bf16"}),
    (1, {"seq_len": 64, "documents": True, "precision": "bf16", "recompute": "selective"}),
    (2, {"seq_len": 64, "documents": True, "precision": "bf16", "cp": 2}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "schedule": "interleaved_1f1b", "virtual_stages": 2, "precision": "bf16", "family": "gpt2"}),
    (2, {"pp": 2, "schedule": "zbv_zero_bubble", "virtual_stages": 2}),
    (2, {"tp": 2, "recompute": "selective", "precision": "bf16"}),
    (2, {"engine": "deepspeed", "zero": 0}),
    (2, {"engine": "deepspeed", "zero": 1}),
    (2, {"engine": "deepspeed", "zero": 2, "precision": "bf16"}),
    (2, {"engine": "deepspeed", "zero": 3, "precision": "bf16", "family": "gpt2"}),
    (4, {"pp": 2, "zero": 3}),
    (4, {"tp": 2, "zero": 1}),
    (4, {"tp": 2, "zero": 1, "precision": "bf16"}),
    (4, {"engine": "deepspeed", "tp": 2, "zero": 2, "family": "gpt2"}),
    (8, {"tp": 2, "pp": 2, "zero": 3}),
    (8, {"zero": 1, "dp_replicate": 2, "precision": "bf16", "family": "gpt2"}),
    (8, {"engine": "deepspeed", "zero": 3}),
]


def job(world, precision="fp32", micro=None, seq_len=SEQ_LEN, documents=False, window=None, **changes):
    """Return a job with two micro-batches a step, in a pipeline two for each stage, unless `micro` says otherwise."""
    config = layout_job(micro=micro or rows(changes, world), **changes)
    config.precision.name = precision
    config.train.seq_len = config.model.max_seq_len = seq_len
    config.train.mask_documents, config.model.sliding_window = documents, window
    return config


@pytest.mark.parametrize(("world", "changes"), CASES, ids=str)
def test_ranks_hold_what_the_formula_says(world, changes):
    """Every rank's bytes, summed from its tensors, agree with the formula for its coordinate in the layout."""
    config = job(world, **changes)
    layout = Layout.of(config, world)
    model = MemoryModel(config.model, config.optim, DeepSpeedSizes(reduce_bucket=BUCKET, persistence_threshold=0))
    for rank, held in enumerate(run_ranks(held_in_a_step, world, config, PATCH)):
        memory = model.of_rank(config, layout, rank)
        for kind, within in (("parameters", 0.05), ("gradients", 0.05), ("optimizer", 0.05), ("activations", 0.03)):
            assert held[kind] == pytest.approx(getattr(memory, kind), rel=within), (rank, kind, held, memory)
        assert held["working"] <= memory.working, (rank, held, memory)


def peak_of_a_ring(world, model, precision, seq_len, documents):
    """Return the most bytes that ring attention and its gradients allocate at once, for two rows."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    shapes = [(2, seq_len // world.size, heads, model.head_dim) for heads in (model.num_heads, *2 * [model.kv_heads])]
    q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes)  # as the model's
    upstream = torch.ones_like(q)
    mask = document_mask(torch.arange(seq_len).expand(2, -1) // 100, dtype) if documents else None
    attend = make_attend("ring", torch.distributed.group.WORLD)
    return peak_bytes(lambda: attend(q, k, v, mask, 0.0).backward(upstream))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("world", "kv_heads", "documents"), [(2, 4, False), (2, 1, False), (4, 4, False), (4, 2, False), (2, 2, True)]
)
def test_a_ring_holds_what_the_formula_says(world, kv_heads, documents, precision):
    """What attention itself allocates, on a sequence whose scores would be larger than everything else."""
    model, seq_len = ModelConfig(num_heads=4, num_kv_heads=kv_heads, hidden_size=64, vocab_size=VOCAB), 2048
    w, tokens = FORMAT_BYTES[precision], 2 * seq_len // world
    split = activations.Split("native", 1, world, "ring", 0, on_gpu=False, masks=2 if documents else 0)
    result = tokens * (4 * model.hidden_size + 4 * model.num_heads + (w * model.hidden_size if w < 4 else 0))
    formula = result + activations.count(model, split, precision, "none", 2, seq_len).backward
    for held in run_ranks(peak_of_a_ring, world, model, precision, seq_len, documents):
        assert held == pytest.approx(formula, rel=0.03)


def test_the_buffer_sizes_are_deepspeeds_defaults():
    """The buffer sizes in the formula are DeepSpeed's defaults, and the engine sets none of them."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from megatrain.engine.deepspeed_config import deepspeed_config

    sizes, defaults = DeepSpeedSizes(), DeepSpeedZeroConfig(stage=3)
    assert sizes == (
        defaults.reduce_bucket_size,
        defaults.param_persistence_threshold,
        defaults.sub_group_size,
        defaults.max_live_parameters,
    )
    given = deepspeed_config(job(4, engine="deepspeed", zero=3), 4)["zero_optimization"]
    assert not [key for key in given if "bucket" in key or "threshold" in key or "live" in key or "sub_group" in key]


def test_the_formula_counts_the_engines_optimizer_groups():
    """DeepSpeed partitions each group separately: matrices, and the rest."""
    model = MemoryModel(job(1).model)
    matrices = [shape for shape in model.shapes.values() if decays(len(shape))]
    assert len(model._groups(plan.shares({"tp": 1}, {"tp": 0}))[0]) == len(matrices)

"""Any legal layout gives the result of one process: losses, norms, first gradients, parameters, held-out losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import jobs
from support.jobs import LIMITS, batches, compare, gpt2, layout_job, parity_steps, rows
from support.ranks import run_ranks
from torch.distributed.tensor import DTensor

from megatrain.data.batch import MicroBatch
from megatrain.engine.build import build_engine
from megatrain.engine.common import choose_kernels
from megatrain.kernels import choice, linear
from megatrain.parallel.rules import check
from megatrain.parallel.sharding import local

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
    (2, "llama", {"cp": 2, "cp_kind": "ring", "recompute": "selective"}),
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
    (2, "llama", {"engine": "deepspeed", "tp": 2, "zero": 0}),
    (2, "gpt2", {"engine": "deepspeed", "tp": 2, "zero": 1, "recompute": "selective"}),
    (2, "gpt2", {"engine": "deepspeed", "tp": 2, "zero": 2, "recompute": "full"}),
    (4, "gpt2", {"engine": "deepspeed", "tp": 2, "zero": 3}),
    (4, "llama", {"engine": "deepspeed", "tp": 4, "zero": 2}),
    (4, "llama", {"engine": "deepspeed", "tp": 2, "cp": 2, "zero": 3}),
    (8, "gpt2", {"pp": 2, "tp": 2, "zero": 3}),
]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Run the same steps on one process, once for each family and choice of kernels.

    `documents`: None; "masked" or "unmasked", of batches with many ends of documents; or "packed" or "unreset", of
    packed samples, with positions of their own or without.
    """
    known = {}

    def get(family, kernels="auto", documents=None):
        key = family, kernels, documents
        if key not in known:
            config = layout_job(family=family, micro=8)
            config.kernels, config.train.mask_documents = kernels, documents is not None
            if documents in ("packed", "unreset"):
                config.data.packing, config.train.reset_positions = "best_fit", documents == "packed"
            with pytest.MonkeyPatch.context() as patch:
                if documents == "unmasked":
                    patch.setattr(jobs, "with_documents", lambda tokens, labels, end: MicroBatch(tokens, labels))
                known[key] = run_ranks(parity_steps, 1, config, str(tmp_path_factory.mktemp("one")))[0]
        return known[key]

    return get


@pytest.mark.parametrize(("ranks", "family", "changes"), CELLS, ids=str)
def test_a_layout_gives_the_result_of_one_process(ranks, family, changes, one_process, tmp_path):
    config = layout_job(family=family, micro=rows(changes, ranks), **changes)
    check(config, ranks)
    compare(run_ranks(parity_steps, ranks, config, str(tmp_path), timeout_s=300), one_process(family))


@pytest.mark.parametrize(
    ("ranks", "family", "changes"),
    [
        (1, "gpt2", {"recompute": "selective"}),
        (2, "llama", {"tp": 2}),
        (2, "gpt2", {"zero": 3}),
        (2, "gpt2", {"pp": 2, "virtual_stages": 2, "schedule": "zbv_zero_bubble"}),
        (2, "llama", {"engine": "deepspeed", "zero": 3}),
    ],
    ids=str,
)
def test_fused_kernels_give_the_result_of_the_plain_ones(ranks, family, changes, tmp_path):
    """Triton kernels, interpreted on a CPU, run between layers of DTensor, FSDP2 or ZeRO-3. One block and few steps,
    because the interpreter takes a second for each block of each micro-batch."""
    fused, plain = (
        layout_job(family=family, micro=2 if "pp" in changes else 4, **changes),
        layout_job(family=family, micro=8),
    )
    for config in (fused, plain):
        config.train.global_batch_size = config.train.seq_len = 8
    fused.kernels, plain.kernels = "triton", "reference"
    fused.model.num_layers = plain.model.num_layers = 4 if "pp" in changes else 1
    expected = run_ranks(parity_steps, 1, plain, str(tmp_path / "plain"), 2)[0]
    compare(run_ranks(parity_steps, ranks, fused, str(tmp_path / "fused"), 2, timeout_s=300), expected)


@pytest.mark.parametrize(
    ("ranks", "family", "changes"),
    [
        (2, "llama", {"zero": 3, "recompute": "full"}),
        (2, "llama", {"tp": 2, "recompute": "selective"}),
        (2, "gpt2", {"cp": 2}),
        pytest.param(2, "gpt2", {"tp": 2, "compile": True}, marks=pytest.mark.slow_build),
        pytest.param(2, "llama", {"zero": 3, "recompute": "selective", "compile": True}, marks=pytest.mark.slow_build),
        (2, "llama", {"cp": 2, "cp_kind": "ring"}),
        (4, "gpt2", {"pp": 2, "tp": 2}),
        (4, "llama", {**V, "zero": 1}),
        (2, "gpt2", {"engine": "deepspeed", "zero": 3}),
        (4, "llama", {"engine": "deepspeed", "tp": 2, "cp": 2, "zero": 1}),
    ],
    ids=str,
)
def test_documents_are_separated_as_on_one_process(ranks, family, changes, one_process, tmp_path):
    """`train.mask_documents` gives the same result in a layout as on one process, and it changes the result."""
    config = layout_job(family=family, micro=rows(changes, ranks), **changes)
    config.train.mask_documents = True
    check(config, ranks)
    expected, unmasked = (one_process(family, documents=kind) for kind in ("masked", "unmasked"))
    compare(run_ranks(parity_steps, ranks, config, str(tmp_path), timeout_s=300), expected)
    assert abs(expected[0][-1][0] / unmasked[0][-1][0] - 1) > 10 * LIMITS["loss"], "the mask made no difference"


@pytest.mark.parametrize(
    ("ranks", "family", "changes"),
    [
        (2, "gpt2", {"tp": 2, "recompute": "selective"}),
        (2, "gpt2", {"cp": 2, "cp_kind": "ring"}),
        (2, "llama", {"cp": 2, "zero": 3}),
        (2, "gpt2", {"pp": 2}),
        (2, "gpt2", {"engine": "deepspeed", "zero": 3}),
        (4, "llama", {"pp": 2, "tp": 2}),
        (4, "gpt2", {"engine": "deepspeed", "tp": 2, "cp": 2, "zero": 1}),
    ],
    ids=str,
)
def test_packed_samples_give_the_result_of_one_process(ranks, family, changes, one_process, tmp_path):
    """Padding, labels left out, documents kept apart, and positions of their own. Samples are filled unevenly, so a
    mean over a rank's labels would differ from that over all."""
    config = layout_job(family=family, micro=rows(changes, ranks), **changes)
    config.data.packing, config.train.mask_documents, config.train.reset_positions = "best_fit", True, True
    check(config, ranks)
    expected = one_process(family, documents="packed")
    compare(run_ranks(parity_steps, ranks, config, str(tmp_path), timeout_s=300), expected)
    if family == "gpt2":  # with RoPE a mask alone gives the same
        unreset = one_process(family, documents="unreset")
        assert abs(expected[0][-1][0] / unreset[0][-1][0] - 1) > 10 * LIMITS["loss"], "positions made no difference"


@pytest.mark.parametrize(
    ("ranks", "family", "changes"),
    [
        (1, "gpt2", {"recompute": "selective"}),
        (1, "llama", {"compile": True}),
        (2, "llama", {"tp": 2}),
        (2, "gpt2", {"zero": 3, "recompute": "full"}),
        (2, "gpt2", {"pp": 2, "virtual_stages": 2, "schedule": "zbv_zero_bubble"}),
        (2, "llama", {"cp": 2, "zero": 3}),
        (2, "llama", {"engine": "deepspeed", "zero": 3}),
        (2, "gpt2", {"engine": "deepspeed", "tp": 2, "zero": 1}),
    ],
    ids=str,
)
def test_products_by_onednn_give_the_result_of_torchs(ranks, family, changes, one_process, monkeypatch, tmp_path):
    """At every size and on any processor. Layers that are split, or whose two gradients are computed separately, keep
    torch's products."""
    plain = one_process(family, kernels="reference")
    for module in (linear, choice):
        monkeypatch.setattr(module, "prefers_onednn", lambda: True)
    monkeypatch.setattr(linear, "_SMALLEST", 1)
    changes = dict(changes)
    compiled = changes.pop("compile", False)
    config = layout_job(family=family, micro=4 if "pp" in changes else 16 // ranks, **changes)
    config.compile = compiled
    cut = changes.get("tp", 1) > 1 or changes.get("schedule") == "zbv_zero_bubble"
    assert choose_kernels(config, torch.device("cpu")) is (choice.CHUNKED if cut else choice.ONEDNN)
    compare(run_ranks(parity_steps, ranks, config, str(tmp_path), timeout_s=300), plain)


@pytest.mark.parametrize(("recompute", "forward"), [("none", 1), ("selective", 1), ("full", 2)])
def test_selective_recompute_keeps_onednns_products(recompute, forward, monkeypatch):
    """Each layer has one product in the forward pass, another with full recompute, and two for its gradients; the head
    has three."""
    for module in (linear, choice):
        monkeypatch.setattr(module, "prefers_onednn", lambda: True)
    monkeypatch.setattr(linear, "_SMALLEST", 1)
    config = layout_job(family="gpt2", micro=16)
    config.train.recompute = recompute
    layers = 6 * config.model.num_layers
    assert run_ranks(onednn_products, 1, config) == [(forward + 2) * layers + 3]


def onednn_products(world, config):
    """Return the number of a step's products that oneDNN computed."""
    count, multiply = [0], linear._onednn

    def counted(*factors):
        count[0] += 1
        return multiply(*factors)

    linear._onednn = counted
    engine = build_engine(config, world)
    engine.train_step(batches(config, 1, 0, 1), config.optim.lr, 1)
    return count[0]


def first_norm(world, config):
    """Return the gradient norm of one step."""
    engine = build_engine(config, world)
    micro_batches = batches(config, 1, 0, 1)
    return float(engine.train_step(micro_batches, config.optim.lr, 1).grad_norm)


@pytest.mark.parametrize(("engine", "zero"), [("native", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)])
def test_the_norm_counts_every_tensor_rank_in_low_precision(engine, zero):
    """bf16 uses other optimizers than fp32; the norm is that of one process up to bf16's rounding."""
    one, two = layout_job(micro=4), layout_job(engine=engine, micro=4, tp=2, zero=zero)
    one.precision.name = two.precision.name = "bf16"
    check(two, 2)
    expected = run_ranks(first_norm, 1, one)[0]
    assert run_ranks(first_norm, 2, two) == pytest.approx([expected] * 2, rel=5e-3)


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_query_and_key_norms_learn_from_the_heads_of_all_tensor_ranks(engine, tmp_path):
    """Query and key norms are whole on every tensor rank but act only on its heads, so their gradients are summed."""
    one, two = layout_job(micro=8), layout_job(engine=engine, micro=2, tp=2, zero=3)
    one.model.qk_norm = two.model.qk_norm = True
    expected = run_ranks(parity_steps, 1, one, str(tmp_path / "one"))[0]
    compare(run_ranks(parity_steps, 2, two, str(tmp_path / "two"), timeout_s=300), expected)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(2, {"tp": 2}, marks=pytest.mark.slow_build),
        (2, {"zero": 3}),
        (2, {"pp": 2}),
        pytest.param(2, {"engine": "deepspeed", "tp": 2}, marks=pytest.mark.slow_build),
    ],
    ids=str,
)
def test_compiled_blocks_give_the_result_of_one_process(ranks, changes, one_process, tmp_path):
    """A compiled block behind a tensor-parallel embedding once gave silently wrong gradients."""
    config = layout_job(compile=True, micro=rows(changes, ranks), **changes)
    compare(run_ranks(parity_steps, ranks, config, str(tmp_path), timeout_s=500), one_process("llama"))


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {"tp": 2}),
        (2, {"cp": 2}),
        (4, {"pp": 2, "zero": 3, "recompute": "full"}),
        (2, {"engine": "deepspeed", "tp": 2, "recompute": "selective"}),
    ],
    ids=str,
)
def test_dropout_repeats_bit_for_bit(ranks, changes, one_process, tmp_path):
    """Two runs of one layout with dropout are bit-identical and differ from runs without."""
    config = layout_job(micro=rows(changes, ranks), **changes)
    config.model.dropout = 0.2
    first, again = (run_ranks(parity_steps, ranks, config, str(tmp_path / name))[0] for name in ("first", "again"))
    assert first[:2] == again[:2]
    assert all(torch.equal(tensor, again[2][-1][key]) for key, tensor in first[2][-1].items())
    assert first[0] != one_process("llama")[0]


def masked(world, engine):
    """Return what dropout leaves of two equal heads, one on each tensor rank, and of a residual branch."""
    config = layout_job(engine=engine, tp=2)
    config.model = gpt2(num_heads=2, num_layers=1, dropout=0.5, tie_embeddings=False)
    built: Any = build_engine(config, world)
    model = built.engine.module if engine == "deepspeed" else built.stages[0]
    seen = {}
    block = next(model.blocks.children())
    block.attn.o.register_forward_pre_hook(lambda _, inputs: seen.update(heads=inputs[0].detach().clone()))
    block.mlp.register_forward_pre_hook(lambda _, inputs: seen.update(residual=inputs[0]))
    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in ("q", "k", "v"):  # heads that are alike: each gives the sum of what its mask kept
            local(parameter).data.fill_(1.0 if name.endswith("v.bias") else 0.0)
    built.train_step(batches(config, 1, 0, 1), 1e-3, 1)
    residual = seen["residual"]
    whole = residual.full_tensor() if isinstance(residual, DTensor) else residual
    return local(seen["heads"]).flatten(), whole.detach()


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_dropout_differs_between_heads_and_agrees_on_replicated_activations(engine):
    """Tensor ranks have different heads, which draw different masks; replicated activations get the same mask."""
    (mine, whole), (theirs, also_whole) = run_ranks(masked, 2, engine)
    assert not torch.equal(mine, theirs) and mine.std() > 0.1
    assert torch.equal(whole, also_whole)

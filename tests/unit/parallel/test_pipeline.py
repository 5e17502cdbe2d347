"""Pipeline stages: one after the other they are the whole model, and they keep its parameter names."""

from __future__ import annotations

import pytest
import torch
from support.jobs import MIXED

from megatrain.config import ModelConfig
from megatrain.data.batch import MicroBatch
from megatrain.kernels.attention import Documents
from megatrain.kernels.choice import REFERENCE
from megatrain.model.init import build_model
from megatrain.optim.objective import LossMeter, NextToken
from megatrain.parallel.pipeline import Stage, StepInputs

SHAPE = dict(num_layers=3, num_heads=2, hidden_size=8, ffn_size=12, vocab_size=13, max_seq_len=8, init_std=0.3)
FAMILIES = {
    "gpt2": dict(norm="layernorm", position="learned", activation="gelu", bias=True, tie_embeddings=True),
    "llama": dict(tie_embeddings=False),
    "mixed": MIXED,
}


@pytest.fixture(params=FAMILIES)
def config(request):
    return ModelConfig(**SHAPE, **FAMILIES[request.param])


def make_stages(config, *layers):
    """Stages with these blocks, filled from the model of seed 1, and their shared inputs."""
    inputs, meter = StepInputs(), LossMeter(NextToken(), torch.device("cpu"))
    whole = build_model(config, seed=1)
    values = dict(whole.named_parameters())
    stages = [
        Stage(config, blocks, len(layers), index, REFERENCE, inputs, meter) for index, blocks in enumerate(layers)
    ]
    for stage in stages:
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                parameter.copy_(values[stage.single_device_name(name)])
    return whole, stages, inputs


def micro_batches():
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 13, (2, 2, 6), generator=draw)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    documents = Documents([[3, 2], [5]])
    plain, packed = (MicroBatch(batch[:, :-1], batch[:, 1:]) for batch in ids)
    return [plain, MicroBatch(packed.tokens, packed.labels, positions=positions, documents=documents)]


def test_stages_in_order_compute_the_loss_of_the_whole_model(config):
    """Each micro-batch by its number, with its own positions and documents."""
    whole, stages, inputs = make_stages(config, range(1), range(1, 3))
    batches = micro_batches()
    inputs.load(batches, [None, None])
    for number, batch in enumerate(batches):
        hidden = stages[0](batch.tokens, torch.tensor([number]))
        assert hidden.shape == (2, 5, 8)
        expected = whole(batch.tokens, batch.labels, positions=batch.positions, documents=batch.documents)
        torch.testing.assert_close(stages[1](hidden, number), expected)
    inputs.load(batches[1:], [None])
    torch.testing.assert_close(stages[1](stages[0](batches[1].tokens, 0), 0), expected)


def test_a_stage_draws_the_dropout_masks_of_its_micro_batch(config):
    config.dropout = 0.5
    whole, stages, inputs = make_stages(config, range(2), range(2, 3))
    batch = micro_batches()[0]
    inputs.load([batch, batch], [7, 8])
    losses = [stages[1](stages[0](batch.tokens, number), number) for number in (0, 1)]
    expected = [whole(batch.tokens, batch.labels, dropout_seed=seed) for seed in (7, 8)]
    torch.testing.assert_close(losses, expected)
    assert losses[0] != losses[1]


def test_stages_keep_the_names_of_the_whole_model(config):
    """Every parameter is on one stage; a tied weight is on both ends."""
    whole, stages, _ = make_stages(config, range(1), range(1, 2), range(2, 3))
    names = [stage.single_device_name(name) for stage in stages for name, _ in stage.named_parameters()]
    expected = [name for name, _ in whole.named_parameters()]
    assert sorted(names) == sorted([*expected, "embed.weight"] if config.tie_embeddings else expected)
    assert {name for name in names if name.startswith("blocks.1.")} == {
        name for name, _ in stages[1].named_parameters()
    }


def test_units_hold_every_parameter_once_in_forward_order(config):
    """A tied weight on a stage with both ends joins these: they are left to the root."""
    for layers in ([range(3)], [range(1), range(1, 3)]):
        _, stages, _ = make_stages(config, *layers)
        for stage in stages:
            units = stage.units()
            found = [p for unit in units for module in unit for p in module.parameters()]
            left = {id(p) for p in stage.parameters()} - {id(p) for p in found}
            assert len(found) == len({id(p) for p in found})
            joined = config.tie_embeddings and len(stages) == 1
            assert bool(left) == joined
            blocks = list(stage.blocks.children())
            ends = 0 if joined else stage.is_first + stage.is_last
            assert len(units) == len(blocks) + ends
            start = int(stage.is_first and not joined)
            assert units[start : start + len(blocks)] == [[block] for block in blocks]
            if not joined and stage.is_first:
                assert units[0][0] is stage.embed
            if not joined and stage.is_last:
                assert units[-1] == [stage.final_norm, stage.head]


@pytest.mark.parametrize(("num_stages", "index"), [(1, 0), (2, 0), (2, 1)])
def test_a_stage_with_both_ends_ties_them(num_stages, index):
    """Also when it leaves the meta device, which makes new parameters. A stage with one end has nothing to tie."""
    config = ModelConfig(**SHAPE, **FAMILIES["gpt2"])
    with torch.device("meta"):
        meter = LossMeter(NextToken(), torch.device("meta"))
        stage = Stage(config, range(1), num_stages, index, REFERENCE, StepInputs(), meter)
    stage.to_empty(device="cpu")
    if num_stages == 1:
        assert stage.head.weight is stage.embed.weight
    else:
        assert (stage.head is None) == (index == 0) and (stage.embed is None) == (index == 1)

"""Label smoothing gives torch's loss and gradients, whoever computes the logits, and one result in every layout."""

from __future__ import annotations

import pytest
import torch
from support.jobs import batches, compare, layout_job, parity_steps, rows
from support.ranks import run_ranks
from torch.nn import functional as F

from megatrain.config import ModelConfig
from megatrain.engine.build import build_engine
from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.choice import CHUNKED, REFERENCE
from megatrain.kernels.cross_entropy import cross_entropy_sum
from megatrain.model.gpt import GPT
from megatrain.model.init import initial_values
from megatrain.optim.objectives import objective_of

LAYOUTS = [
    (2, {"engine": "deepspeed", "zero": 3}),
    (2, {"engine": "deepspeed", "tp": 2}),
    (2, {"zero": 3}),
    (2, {"tp": 2}),
    (2, {"cp": 2}),
    (2, {"pp": 2, "schedule": "zbv_zero_bubble", "virtual_stages": 2}),
]


@pytest.mark.parametrize("way", ["reference", "chunked", "logits"])
def test_loss_and_gradients_are_those_of_torch(way):
    config = ModelConfig(
        num_layers=1, num_heads=2, hidden_size=16, ffn_size=24, vocab_size=50, max_seq_len=32, init_std=0.3
    )
    model = GPT(config, CHUNKED if way == "chunked" else REFERENCE)
    for name, parameter in model.named_parameters():
        parameter.data = initial_values(config, name, tuple(parameter.shape), 1).view(parameter.shape)
    if way == "logits":
        model.loss = cross_entropy_sum
    torch.manual_seed(2)
    tokens, labels = torch.randint(0, 50, (2, 20)), torch.randint(0, 50, (2, 20))
    labels[0, :7] = IGNORE_INDEX
    weights = torch.rand(2, 20)
    hidden = model.hidden(tokens)
    loss = model.cross_entropy_sum(hidden, labels, weights, 0.2)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    each = F.cross_entropy(
        model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, label_smoothing=0.2, reduction="none"
    )
    expected = (each * weights.flatten()).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    for found, theirs in zip(ours, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


def smoothed(**parallel):
    config = layout_job(**parallel)
    config.method.label_smoothing = 0.3
    return config


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(parity_steps, 1, smoothed(micro=8), str(tmp_path_factory.mktemp("alone")))[0]


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS, ids=str)
def test_every_layout_gives_one_result(ranks, changes, alone, tmp_path):
    compare(run_ranks(parity_steps, ranks, smoothed(micro=rows(changes, ranks), **changes), str(tmp_path)), alone)


def first_losses(world, config):
    engine = build_engine(config, world, objective_of(config))
    heldout, tokens = engine.evaluate(batches(config, 9, 0, 1))
    result = engine.train_step(batches(config, 1, 0, 1), config.optim.lr, 1)
    return float(result.loss_sum) / int(result.tokens), float(heldout) / int(tokens)


def test_labels_are_smoothed_in_training_alone():
    (loss, heldout), (plain, plain_heldout) = (
        run_ranks(first_losses, 1, config)[0] for config in (smoothed(micro=8), layout_job(micro=8))
    )
    assert heldout == plain_heldout and abs(loss - plain) > 1e-4

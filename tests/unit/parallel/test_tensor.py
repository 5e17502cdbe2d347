"""Tensor parallelism of the native engine: a stage cut over two ranks has the loss and gradients of the whole one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.jobs import MIXED
from support.ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from megatrain.config import ModelConfig
from megatrain.data.batch import MicroBatch
from megatrain.kernels.choice import REFERENCE
from megatrain.model.init import build_model
from megatrain.optim.objective import LossMeter, NextToken
from megatrain.parallel import plan
from megatrain.parallel.pipeline import Stage, StepInputs
from megatrain.parallel.tensor import cut_tensors
from megatrain.parallel.vocabulary import vocabulary_parallel_cross_entropy

SHAPE = dict(num_layers=1, num_heads=2, hidden_size=8, ffn_size=12, vocab_size=13, max_seq_len=6, init_std=0.3)
FAMILIES = {
    "gpt2": dict(norm="layernorm", position="learned", activation="gelu", bias=True, tie_embeddings=True),
    "llama": dict(tie_embeddings=False),
    "mixed": MIXED,
}


def batch():
    ids = torch.randint(0, 13, (2, 7), generator=torch.Generator().manual_seed(0))
    return MicroBatch(ids[:, :-1], ids[:, 1:])


def loss_and_gradients(world, config):
    """The loss of a cut stage, its whole gradients, and the shapes that this rank holds."""
    inputs, group = StepInputs(), torch.distributed.group.WORLD
    stage = Stage(config, range(1), 1, 0, REFERENCE, inputs, LossMeter(NextToken(), world.device))
    stage.load_state_dict(build_model(config, seed=1).state_dict())
    cut_tensors(stage, init_device_mesh("cpu", (world.size,), mesh_dim_names=("tp",)))
    first, _ = plan.chunk(config.vocab, world.size, world.rank)
    stage.loss = partial(vocabulary_parallel_cross_entropy, first=first, group=group, kernels=REFERENCE)
    inputs.load([batch()], [None])
    loss = stage(batch().tokens, 0)
    loss.backward()
    gradients, shapes = {}, {}
    for name, parameter in stage.named_parameters():
        gradient = parameter.grad
        shapes[name] = tuple((parameter.to_local() if isinstance(parameter, DTensor) else parameter).shape)
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        elif plan.is_summed(name):
            torch.distributed.all_reduce(gradient)
        gradients[name] = gradient
    return loss.detach(), gradients, shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_stage_has_the_loss_and_gradients_of_the_whole_one(family):
    """Learned positions, norms, biases, a tied and an untied head, and a vocabulary not divisible by the ranks."""
    config = ModelConfig(**SHAPE, **FAMILIES[family])
    whole = build_model(config, seed=1)
    expected = whole(batch().tokens, batch().labels)
    expected.backward()
    for rank, (loss, gradients, shapes) in enumerate(run_ranks(loss_and_gradients, 2, config)):
        torch.testing.assert_close(loss, expected.detach())
        shares = (plan.Share("tp", 2, rank),)
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, msg=lambda text, name=name: f"{name}: {text}")
            assert shapes[name] == plan.block(name, tuple(parameter.shape), shares)[1], name

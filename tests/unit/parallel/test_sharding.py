"""ZeRO of the native engine on small modules: summed gradients, when they are reduced, and what stays gathered."""

from __future__ import annotations

import pytest
import torch
from support.collectives import CountTraffic
from support.jobs import layout_job
from support.ranks import run_ranks
from torch import nn

from megatrain.config import PrecisionConfig
from megatrain.parallel.layout import Layout
from megatrain.parallel.mesh import make_groups
from megatrain.parallel.sharding import before_backward, forget_gathered, local, shard
from megatrain.planner.communication import ALL_REDUCE, REDUCE_SCATTER

WIDTH, MICRO_BATCHES = 6, 3


class Model(nn.Module):
    """Two units and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale


def make_model():
    torch.manual_seed(3)
    return Model()


def micro_batches(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(4, WIDTH, generator=generator) for _ in range(MICRO_BATCHES)]


def step(world, zero, replicas):
    """Run one step; return whole gradients, reductions, sizes held in between, and an output after new shards."""
    layout = Layout.of(layout_job(zero=zero, dp_replicate=replicas), world.size)
    model = make_model()
    groups = make_groups(layout, world.rank, world.device)
    shard(model, [[model.first], [model.second]], zero, groups, PrecisionConfig())
    shards = dict(model.named_parameters())
    held = []
    with CountTraffic() as counter:
        for index, x in enumerate(micro_batches(world.rank)):
            loss = model(x).square().sum()
            held.append(local(model.first.weight).numel())
            before_backward(model, zero, index == MICRO_BATCHES - 1, reduces_in_fp32=True)
            loss.backward()
            held.append(local(model.first.weight).numel())
    reductions = sum(n.calls for kind, n in counter.counts.items() if kind.collective in (ALL_REDUCE, REDUCE_SCATTER))
    gradients = {name: p.grad.full_tensor() if zero else local(p.grad) for name, p in shards.items()}
    with torch.no_grad():
        model(torch.ones(1, WIDTH))
        for parameter in shards.values():
            local(parameter).zero_()
        forget_gathered(model)
        output = model(torch.ones(1, WIDTH))
    return {name: tensor.detach() for name, tensor in gradients.items()}, reductions, held, output


@pytest.mark.parametrize(("zero", "ranks", "replicas"), [(0, 2, 1), (1, 2, 1), (2, 2, 1), (3, 2, 1), (3, 4, 2)])
def test_gradients_are_summed_over_ranks_and_micro_batches(zero, ranks, replicas):
    """Stages 0 and 1 reduce each unit once a step, 2 and 3 after every micro-batch; only 3 frees gathered parameters
    before the step's end. Replicas are all-reduced once a step."""
    whole = make_model()
    for rank in range(ranks):
        for x in micro_batches(rank):
            whole(x).square().sum().backward()
    units, pieces = 3, ranks // replicas
    expected_reductions = units * (1 if zero < 2 else MICRO_BATCHES) + (units if replicas > 1 else 0)
    elements = whole.first.weight.numel()
    for rank, (gradients, reductions, held, output) in enumerate(run_ranks(step, ranks, zero, replicas)):
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5)
        assert reductions == expected_reductions
        assert not output.any(), "the gathered parameters of an earlier forward pass were used"
        if zero in (1, 2):
            assert held[:-1] == [elements] * (2 * MICRO_BATCHES - 1), "gathered parameters stay until the step's end"
        if zero:
            rows = len(torch.arange(5).chunk(pieces)[rank % pieces])
            assert held[-1] == rows * WIDTH
        if zero == 3:
            assert held == [rows * WIDTH] * (2 * MICRO_BATCHES)

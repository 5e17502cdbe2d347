"""Quantised weights: the numbers are torchao's, they are stored without loss, and a layer computes with them."""

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

from megatrain.model.quantized import _INT4, Quantized, quantize

CONFIGS = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=_INT4, granularity=PerGroup(8)),
}


def weight(rows=6, columns=32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_layer_computes_what_torchao_gives_for_the_same_weight(kind):
    layer = nn.Linear(32, 6, bias=False)
    layer.weight.data = weight()
    quantize_(layer, CONFIGS[kind])
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    ours = quantize(weight(), kind, 8)
    assert torch.equal(nn.functional.linear(x, ours.tensor(torch.device("cpu"))), layer(x))
    assert torch.allclose(nn.functional.linear(x, ours.dense()), layer(x), atol=1e-5)
    assert ours.shape == (6, 32)


def test_values_are_rounded_to_the_nearest_step_of_their_row_or_group():
    """The largest of a row is 127.5 steps from 0, the largest of a group 7.5, and nothing is off by more than half."""
    for kind, group, half in (("int8", 32, 127.5), ("int4", 8, 7.5)):
        found = quantize(weight(), kind, group)
        groups = weight().double().unflatten(1, (-1, group))
        step = groups.abs().amax(-1, keepdim=True) / half
        off = (found.dense().double().unflatten(1, (-1, group)) - groups).abs() / step
        assert float(off.max()) < 0.5001, kind
        assert torch.allclose(found.scale.double().flatten(), step.flatten(), rtol=1e-5)


def test_two_values_a_byte_are_unpacked_as_they_were():
    low = torch.arange(-8, 8, dtype=torch.int8).repeat_interleave(16)
    high = torch.arange(-8, 8, dtype=torch.int8).repeat(16)
    packed = ((low + 8).to(torch.uint8) | ((high + 8).to(torch.uint8) << 4)).unsqueeze(0)
    found = Quantized("int4", packed, torch.ones(1, 1)).unpacked()
    assert torch.equal(found[0, 0::2], low) and torch.equal(found[0, 1::2], high)

"""Pruning keeps the largest values: torch's own pruning, and two of every four, are the references."""

import torch
from torch.nn.utils.prune import L1Unstructured

from megatrain.compress.prune import tensor_threshold, two_of_four, without_small


def weight(rows=7, columns=24):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


def test_the_smallest_values_of_a_share_become_zero_as_in_torch():
    wanted = L1Unstructured(amount=0.3).prune(weight())
    assert torch.equal(without_small(weight(), tensor_threshold(weight(), 0.3)), wanted)


def test_each_four_neighbours_keep_the_two_largest():
    found = two_of_four(weight())
    for row, pruned in zip(weight().tolist(), found.tolist(), strict=True):
        for start in range(0, 24, 4):
            four = row[start : start + 4]
            largest = sorted(four, key=abs)[2:]
            assert pruned[start : start + 4] == [value if value in largest else 0 for value in four]

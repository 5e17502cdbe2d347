"""Objectives: next-token prediction, and the meter that sums an objective's own scalars over a step."""

from __future__ import annotations

import torch

from megatrain.data.batch import MicroBatch
from megatrain.kernels import IGNORE_INDEX
from megatrain.optim.objective import LossMeter, NextToken

CPU = torch.device("cpu")


class Head:
    """Records what it is asked for; the loss is the sum of `hidden`."""

    def __init__(self):
        self.calls = []

    def cross_entropy_sum(self, hidden, labels, weights):
        self.calls.append((labels, weights))
        return hidden.sum()


class WithScalars:
    """The sum of `hidden` as the loss, and two scalars."""

    scalar_names = ("first", "second")

    def count(self, micro_batch):
        return micro_batch.labels.numel()

    def __call__(self, head, hidden, micro_batch):
        return hidden.sum(), (hidden.max(), 2 * hidden.max())


def batch(labels, weights=None):
    labels = torch.tensor([labels])
    return MicroBatch(torch.zeros_like(labels), labels, loss_weights=weights)


def test_next_token_counts_the_labels_that_are_not_ignored():
    assert NextToken().count(batch([1, IGNORE_INDEX, 3, IGNORE_INDEX])) == 2


def test_next_token_asks_the_head_for_the_weighted_cross_entropy():
    head, micro_batch = Head(), batch([1, 2], torch.tensor([[0.5, 1.0]]))
    loss, scalars = NextToken()(head, torch.ones(1, 2, 3), micro_batch)
    assert loss.item() == 6 and scalars == ()
    ((labels, weights),) = head.calls
    assert labels is micro_batch.labels and weights is micro_batch.loss_weights


def test_the_meter_sums_scalars_over_micro_batches_and_keeps_no_graph():
    meter = LossMeter(WithScalars(), CPU)
    for value in (1.0, 5.0):
        hidden = torch.full((1, 2, 3), value, requires_grad=True)
        loss = meter(Head(), hidden, batch([1, 2]))
        assert loss.item() == 6 * value and loss.requires_grad
    sums = meter.take()
    assert sums.dtype == torch.float64 and sums.tolist() == [6.0, 12.0] and not sums.requires_grad


def test_taking_the_sums_resets_them():
    meter = LossMeter(WithScalars(), CPU)
    meter(Head(), torch.ones(1, 2, 3), batch([1, 2]))
    meter.take()
    assert meter.take().tolist() == [0.0, 0.0]
    meter(Head(), torch.ones(1, 2, 3), batch([1, 2]))
    assert meter.take().tolist() == [1.0, 2.0]


def test_without_scalars_the_sums_are_empty():
    meter = LossMeter(NextToken(), CPU)
    meter(Head(), torch.ones(1, 2, 3), batch([1, 2]))
    assert meter.take().shape == (0,)


def test_the_meter_counts_the_terms_of_all_micro_batches():
    assert LossMeter(NextToken(), CPU).count([batch([1, IGNORE_INDEX]), batch([1, 2])]) == 3

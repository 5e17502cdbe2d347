"""Results of a step on their way from the device to the host."""

from __future__ import annotations

import time

import torch

from megatrain.engine.protocol import SentResult, StepResult


def result():
    values = torch.tensor(6.0), torch.tensor(3), torch.tensor(0.5), torch.tensor(True)
    return StepResult(*values, {"loss_scale": torch.tensor(8.0), "extra": torch.tensor(9.0)})


class Arrival:
    """Stands for a CUDA event that has passed at the `polls`-th query."""

    def __init__(self, polls):
        self.polls = polls
        self.waits = 0

    def query(self):
        self.polls -= 1
        return self.polls <= 0

    def synchronize(self):
        self.waits += 1

    def elapsed_time(self, other):
        return 1500.0


def test_a_result_on_the_host_arrives_unchanged_and_at_once():
    sent = result().sent()
    assert sent.arrived is None and sent.comes_within(0.0)
    read, given = sent.read(), result()
    assert [t.item() for t in (read.loss_sum, read.tokens, read.grad_norm, read.updated)] == [6.0, 3, 0.5, True]
    assert {name: value.item() for name, value in read.aux.items()} == {"loss_scale": 8.0, "extra": 9.0}
    assert read.tokens.dtype == given.tokens.dtype and read.updated.dtype == torch.bool


def test_reading_waits_for_the_copy():
    arrival = Arrival(polls=1)
    values = result()
    assert SentResult(values, arrival).read() is values and arrival.waits == 1


def test_waiting_ends_when_the_result_arrives_or_the_time_is_up():
    arrival = Arrival(polls=3)
    assert SentResult(result(), arrival).comes_within(60.0) and arrival.polls == 0
    began = time.monotonic()
    assert not SentResult(result(), Arrival(polls=10**9)).comes_within(0.02)
    assert 0.02 <= time.monotonic() - began < 10
    assert arrival.waits == 0


def test_seconds_are_the_devices_own():
    """Without events, on a CPU, there are none."""
    assert SentResult(result(), Arrival(1)).seconds_since(Arrival(1)) == 1.5
    assert SentResult(result(), None).seconds_since(Arrival(1)) is None
    assert SentResult(result(), Arrival(1)).seconds_since(None) is None

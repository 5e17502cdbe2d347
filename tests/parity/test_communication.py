"""A rank communicates exactly what the theory says: calls and bytes of each collective are equal as integers."""

from __future__ import annotations

import pytest
from support.collectives import CELLS, cell, expected, second_step
from support.ranks import run_ranks

from megatrain.model.count import num_parameters
from megatrain.parallel.rules import check
from megatrain.planner.communication import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    RECEIVE,
    REDUCE_SCATTER,
    SEND,
    Traffic,
    Zero3Settings,
    step_traffic,
)

GLOO = {
    "all_reduce": (ALL_REDUCE, REDUCE_SCATTER),  # gloo implements reduce-scatter as an all-reduce
    "all_gather": (ALL_GATHER,),
    "all_to_all": (ALL_TO_ALL,),
    "send": (SEND,),
    "recv": (RECEIVE,),
}
"""What gloo is asked for, and which collectives it serves with it."""


@pytest.mark.parametrize(("ranks", "changes"), CELLS, ids=str)
def test_a_step_communicates_what_the_theory_says(ranks, changes):
    config, zero3 = cell(changes)
    check(config, ranks)
    for rank, counted in enumerate(run_ranks(second_step, ranks, config, zero3)):
        assert counted == expected(step_traffic(config, ranks, rank, zero3)), f"rank {rank}"


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (4, {"pp": 2, "tp": 2, "recompute": "full", "micro": 8}),
        (2, {"cp": 2, "zero": 3, "micro": 8}),
        (2, {"engine": "deepspeed", "zero": 3, "micro": 8}),
    ],
    ids=str,
)
def test_nothing_escapes_the_counter(ranks, changes):
    """Torch's profiler, which observes the process groups at a lower level, counts as many calls of each kind."""
    config, zero3 = cell(changes)
    for counted, profiled in run_ranks(second_step, ranks, config, zero3, True):
        calls = {
            name: sum(count.calls for kind, count in counted.items() if kind.collective in collectives)
            for name, collectives in GLOO.items()
        }
        assert profiled == {name: number for name, number in calls.items() if number}


def test_zero_3_gathers_twice_and_reduces_once_a_micro_batch():
    """The theory agrees with Rajbhandari et al. (2020, arXiv:1910.02054, section 7)."""
    config, _ = cell({"zero": 3})
    config.model.vocab_size = 102  # every first dimension except the feed-forward layer's is divisible by 2
    config.model.ffn_size = 40
    totals = {part.collective: part for part in step_traffic(config, 2, 0) if part.axis == "shard"}
    micro_batches = 16 // (4 * 2)
    assert totals[ALL_GATHER].num_bytes == 2 * micro_batches * 4 * num_parameters(config.model)
    assert totals[REDUCE_SCATTER].num_bytes == micro_batches * 4 * num_parameters(config.model)


def test_a_ring_sends_an_all_reduce_twice():
    def sent(collective, ranks):
        return Traffic("", collective, "tp", tuple(range(ranks)), "float32", 1, 1200).wire_bytes

    assert [sent(ALL_GATHER, ranks) for ranks in (2, 3, 4)] == [600, 800, 900]
    assert [sent(ALL_REDUCE, ranks) for ranks in (2, 3, 4)] == [1200, 1600, 1800]
    assert sent(RECEIVE, 2) == 0


def test_deepspeed_in_low_precision_is_not_described():
    config, _ = cell({"engine": "deepspeed", "zero": 3})
    config.precision.name = "bf16"
    with pytest.raises(AssertionError, match="low-precision"):
        step_traffic(config, 2, 0, Zero3Settings())

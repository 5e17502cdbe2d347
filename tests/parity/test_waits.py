"""A rank's time in communication, on every kind of collective: a rank that dawdles costs the others waits, not own time."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist
from support.jobs import batches, layout_job
from support.ranks import run_ranks

from megatrain.distributed.waits import timed_waits
from megatrain.engine.build import build_engine
from megatrain.model.gpt import Block
from megatrain.parallel.layout import Layout
from megatrain.resilience.heartbeat import Heartbeat, Heartbeats

NAP_S = 0.03
"""What rank 1 sleeps in each block's forward."""


def dawdle(world, config):
    """Two steps, the second with a rank 1 that sleeps: what it slept and what each rank waited in that step."""
    engine = build_engine(config, world)
    layout = Layout.of(config, world.size)
    napped = 0.0
    forward = Block.forward

    def with_a_nap(*args, **kwargs):
        nonlocal napped
        napped += NAP_S
        time.sleep(NAP_S)
        return forward(*args, **kwargs)

    with timed_waits() as waits:
        for step in (1, 2):
            if step == 2 and world.rank == 1:
                Block.forward = with_a_nap
            before = waits.waited()
            started = time.perf_counter()
            engine.train_step(batches(config, step, layout.dp_rank(world.rank), layout.dp), 1e-3, step)
    return napped, waits.waited() - before, time.perf_counter() - started


@pytest.mark.parametrize(
    ("engine", "parallel"),
    [
        ("deepspeed", {"zero": 3}),
        ("deepspeed", {"zero": 0}),
        ("deepspeed", {"tp": 2}),
        ("native", {"zero": 3}),
        ("native", {"tp": 2}),
        ("native", {"pp": 2}),
        ("native", {"cp": 2, "cp_kind": "ring"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_waiting_for_a_rank_that_dawdles_is_seen(engine, parallel):
    (_, waited, took), (napped, own_waits, dawdler_took) = run_ranks(dawdle, 2, layout_job(engine, micro=2, **parallel))
    assert napped > 0.2
    assert 0.6 * napped < waited <= took, "the other rank waits while this one sleeps"
    assert own_waits <= dawdler_took - napped, "sleeping is no waiting"


def one_wait(world):
    """An all-reduce that rank 1 joins late, in the training thread, in another thread, and after the timing has ended."""

    def late():
        if world.rank == 1:
            time.sleep(0.3)
        dist.all_reduce(torch.ones(1))

    heartbeats = Heartbeats(1)
    heartbeat = Heartbeat(heartbeats.file, 0)
    heartbeat.enter("backward", 1)
    seen = []
    with timed_waits(heartbeat.waited) as waits:
        late()
        seen.append(waits.waited())
        thread = threading.Thread(target=late)
        thread.start()
        thread.join()
        seen.append(waits.waited() - seen[0])
        heartbeat.enter("exchange")
        late()  # a phase that is nothing but communication
        heartbeat.beat()
    late()
    return [*seen, waits.waited(), heartbeats.account(0).seconds["waited"]]


def test_only_the_training_threads_waits_count_and_only_while_they_are_timed():
    in_training, elsewhere, total, booked = run_ranks(one_wait, 2)[0]
    assert 0.2 < in_training < 0.5 and elsewhere == 0.0
    assert in_training + 0.2 < total < in_training + 0.5, "the third one counts, the fourth one does not"
    assert booked == pytest.approx(in_training, abs=1e-6), "the exchange is booked as a phase of its own"


def test_time_without_a_core_is_no_time_of_ones_own():
    """Four ranks on one core: what the kernel gives them is not held against the rank."""
    seen = run_ranks(compete, 4)
    for wall, own, cpu in seen:
        assert own == pytest.approx(cpu, rel=0.1, abs=0.02) and own < 0.7 * wall


def compete(world):
    """Every rank computes on one and the same core; wall time, own time and processor time of this one."""
    import os

    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    world.barrier()
    with timed_waits() as waits:
        wall, held_up, cpu = time.perf_counter(), waits.held_up(), time.thread_time()
        while time.perf_counter() < wall + 1.0:
            sum(range(1000))
        wall = time.perf_counter() - wall
        return wall, wall - (waits.held_up() - held_up), time.thread_time() - cpu

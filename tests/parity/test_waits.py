"""The time a rank spends in each kind of collective: the others wait for a slow rank, which itself does not wait.

No test here compares durations of computation. The slow rank continues only after it has seen the other one in the
same wait for `NAP_S`, so the minimum waiting time is known on a busy machine too.
"""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from support.jobs import batches, layout_job
from support.ranks import run_ranks

from megatrain.distributed import waits as module
from megatrain.distributed.waits import Waits, timed_waits
from megatrain.engine.build import build_engine
from megatrain.model.gpt import Block
from megatrain.parallel.layout import Layout
from megatrain.resilience.heartbeat import Heartbeat, Heartbeats

NAP_S = 0.01
LIMIT_S = 60


class WaitSignal:
    """A number in a file: rank 0 makes it odd when a blocking wait begins and even when it ends."""

    def __init__(self, path):
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)
        self.number = 0

    def publish_waits(self):
        """Have every wait for communication in this process raise and lower the signal, whether it is timed or not."""
        dist.Work.wait = self._signalled(dist.Work.wait)
        functional.wait_tensor = self._signalled(functional.wait_tensor)

    def _signalled(self, function):
        def wait(*args, **kwargs):
            self._advance()
            try:
                return function(*args, **kwargs)
            finally:
                self._advance()

        return wait

    def _advance(self):
        self.number += 1
        os.pwrite(self.file, self.number.to_bytes(8, "little"), 0)

    def _read(self):
        return int.from_bytes(os.pread(self.file, 8, 0), "little")

    def nap_while_other_waits(self):
        """Return once the other rank has been in one wait for `NAP_S` seconds."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            before = self._read()
            time.sleep(NAP_S)
            if before % 2 and self._read() == before:
                return
            assert time.monotonic() < deadline, "the other rank is in no wait that timed_waits knows"


def slow_forward(world, config, path):
    """Run two steps, the second with a slow rank 1; return its naps, the rank's waits and the duration of that step."""
    signal = WaitSignal(path)
    if world.rank == 0:
        signal.publish_waits()
    engine = build_engine(config, world)
    layout = Layout.of(config, world.size)
    naps = 0
    forward = Block.forward

    def with_a_nap(*args, **kwargs):
        nonlocal naps
        naps += 1
        signal.nap_while_other_waits()
        return forward(*args, **kwargs)

    with timed_waits() as waits:
        for step in (1, 2):
            if step == 2 and world.rank == 1:
                Block.forward = with_a_nap
            before = waits.waited()
            started = time.perf_counter()
            engine.train_step(batches(config, step, layout.dp_rank(world.rank), layout.dp), 1e-3, step)
        return naps * NAP_S, waits.waited() - before, time.perf_counter() - started


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
def test_waiting_for_a_slow_rank_is_measured(engine, parallel, tmp_path):
    config = layout_job(engine, micro=4, **parallel)
    (_, waited, took), (napped, own_waits, slow_took) = run_ranks(slow_forward, 2, config, str(tmp_path / "signal"))
    assert napped > 5 * NAP_S
    assert napped <= waited <= took, "rank 0 waits while rank 1 naps"
    assert own_waits <= slow_took - napped, "a nap is not a wait"


def late_collectives(world, path):
    """Join an all-reduce late: in the training thread, in another thread, in an exchange and after the timing has
    ended."""
    signal = WaitSignal(path)
    if world.rank == 0:
        signal.publish_waits()

    def all_reduce():
        if world.rank == 1:
            signal.nap_while_other_waits()
        dist.all_reduce(torch.ones(1))

    heartbeats = Heartbeats(1)
    heartbeat = Heartbeat(heartbeats.file, 0)
    heartbeat.enter("backward", 1)
    seen = []
    with timed_waits(heartbeat.waited) as waits:
        all_reduce()
        seen.append(waits.waited())
        thread = threading.Thread(target=all_reduce)
        thread.start()
        thread.join()
        seen.append(waits.waited())
        heartbeat.enter("exchange")
        all_reduce()  # a phase that consists of communication
        seen.append(waits.waited())
        heartbeat.beat()
    all_reduce()
    return [*seen, waits.waited(), heartbeats.account(0).seconds["waited"]]


def test_only_waits_of_the_training_thread_count_and_only_while_they_are_timed(tmp_path):
    first, second, third, fourth, booked = run_ranks(late_collectives, 2, str(tmp_path / "signal"))[0]
    assert first >= NAP_S
    assert second == first, "another thread's waits do not count"
    assert third >= first + NAP_S
    assert fourth == third, "nothing counts after the timing has ended"
    assert booked == pytest.approx(first, abs=1e-6), "the exchange is booked as a phase of its own"


def test_time_without_a_core_counts_once(monkeypatch):
    """The time a rank is ready but has no core counts, but not again inside a wait."""
    clock = SimpleNamespace(now=0, delay=0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic_ns=lambda: clock.now))
    monkeypatch.setattr(Waits, "_delay", lambda self: clock.delay)

    def run(seconds, without_core):
        clock.now += int(seconds * 1e9)
        clock.delay += int(without_core * 1e9)

    waits = Waits()
    start = waits.held_up()
    run(10.0, without_core=3.0)
    waits.timed(run)(5.0, without_core=2.0)
    waits.close()
    assert waits.waited() == 5.0
    assert waits.held_up() - start == 3.0 + 5.0


def test_the_kernel_reports_how_long_a_rank_waited_for_a_core():
    """Four ranks compute on one core, so each waits for the core some of the time."""
    for wall, held_up in run_ranks(compete, 4):
        assert 0.0 < held_up <= wall


def compete(world):
    """Compute for half a second on the core that all ranks share; return the wall time and how long the rank was held
    up."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    world.barrier()
    with timed_waits() as waits:
        started, before = time.perf_counter(), waits.held_up()
        while time.perf_counter() < started + 0.5:
            sum(range(1000))
        held_up = waits.held_up() - before
        return time.perf_counter() - started, held_up

"""What counts as a hang, and which rank caused it."""

from __future__ import annotations

import time

import pytest

from megatrain.resilience.heartbeat import Beat, Heartbeat, Heartbeats
from megatrain.resilience.watchdog import Limits, Witness, culprits, hangs, read_stacks

WAITING = """Current thread 0x00007f0000000000 (most recent call first):
  File "/x/megatrain/distributed/waits.py", line 70 in wait
  File "/x/torch/distributed/distributed_c10d.py", line 3333 in all_gather
  File "/x/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/x/megatrain/distributed/world.py", line 47 in gather
  File "/x/megatrain/training/trainer.py", line 162 in _meet
"""
IDLE = """Thread 0x00007f1111111111 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait

Current thread 0x00007f0000000000 (most recent call first):
  File "/x/somewhere.py", line 3 in sleep
  File "/x/megatrain/data/loader.py", line 5 in __next__
  File "/x/megatrain/training/trainer.py", line 162 in run
"""


def witness(rank, step=7, state="S", stacks=WAITING, phase="forward"):
    return Witness(rank, Beat(step, 1, phase, 9.0), state, *read_stacks(stacks), stacks)


def test_a_stack_shows_the_collective_and_where_it_was_called():
    assert read_stacks(WAITING) == ("all_gather (distributed_c10d.py)", "megatrain/distributed/world.py:47 gather")
    assert read_stacks(IDLE) == (None, "megatrain/data/loader.py:5 __next__")
    assert read_stacks("") == (None, None)


@pytest.mark.parametrize(
    ("witnesses", "guilty"),
    [
        ([witness(0), witness(1, state="T", stacks=""), witness(2)], [1]),
        ([witness(0), witness(1, stacks=IDLE), witness(2)], [1]),
        ([witness(0, stacks=IDLE), witness(1, state="T", stacks="")], [1]),
        ([witness(0, step=8), witness(1, step=7)], [1]),
        ([witness(0), witness(1)], []),
        ([witness(0, stacks=IDLE)], [0]),
        ([witness(0, stacks=IDLE), witness(1, step=6, stacks=IDLE)], [1]),
        ([witness(0, stacks=IDLE, phase="update"), witness(1, stacks=IDLE)], [1]),
        ([witness(0, phase="update"), witness(1)], []),
        ([witness(0, state="T", stacks=""), witness(1, state="T", stacks="")], []),
    ],
)
def test_the_culprit_is_the_rank_that_does_not_answer_or_is_in_no_collective(witnesses, guilty):
    assert [found.rank for found in culprits(witnesses)] == guilty


def test_a_job_hangs_when_no_rank_makes_progress():
    heartbeats = Heartbeats(2)
    first, second = Heartbeat(heartbeats.file, 0), Heartbeat(heartbeats.file, 1)
    limits = Limits(training_s=0.2, starting_s=30)
    time.sleep(0.3)
    assert not hangs(heartbeats, [0, 1], limits), "starting takes longer"
    for beat in (first, second):
        beat.enter("update", 4)
        beat.enter("data", 5)
    time.sleep(0.3)
    first.beat()
    assert not hangs(heartbeats, [0, 1], limits), "one rank moves: the others wait for it"
    time.sleep(0.3)
    assert hangs(heartbeats, [0, 1], limits)
    second.enter("save")
    time.sleep(0.3)
    assert not hangs(heartbeats, [0, 1], limits), "a slow disk is not a hang, and a save is not cut short"
    second.enter("data")
    first.enter("end")
    time.sleep(0.3)
    assert not hangs(heartbeats, [0, 1], limits), "trackers may take longer to send what is left"
    assert heartbeats.read(1).step == 5 and heartbeats.read(1).finished == 1 and heartbeats.read(1).phase == "data"
    heartbeats.clear()
    assert not hangs(heartbeats, [0, 1], limits)
    assert not hangs(heartbeats, [], limits)

"""The helper that runs ranks: a hang is reported as a hang, a failure as a failure."""

from __future__ import annotations

import time

import pytest
from support.ranks import run_ranks


def sleep(world):
    time.sleep(60)


def fail(world):
    if world.rank == 1:
        raise ValueError("one of two")
    time.sleep(60)


def test_ranks_that_hang_are_ended_and_named():
    """They are not reported as failed ranks without a message."""
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] still ran after 1 s"):
        run_ranks(sleep, 2, timeout_s=1)
    assert time.monotonic() - started < 50


def test_a_rank_that_fails_ends_the_others_and_shows_its_stack_trace():
    """The rank and its error are reported at once, without waiting for the rest."""
    with pytest.raises(AssertionError, match=r"(?s)ranks \[1\] did not end well.*ValueError: one of two"):
        run_ranks(fail, 2, timeout_s=40)

"""What the agent decides after a failure: start again, or end with which code."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatrain.launch.recovery import Recovery, Restarts, decide_restart
from megatrain.resilience.failure import HANG, SIGNAL, Failure, seconds_of, suspects
from megatrain.resilience.fault_classes import JOB, MACHINE, MEMORY, PEER
from megatrain.resilience.watchdog import Limits
from megatrain.tracking.events import EventLog, read_events


def failed(kind, step=7, finished=3, how="Oops", place="a.py:1 in f", host="n1"):
    if kind in (SIGNAL, HANG):
        return Failure(how, 1, step, "forward", host, "why", kind)
    return Failure(how, 1, step, "forward", host, "why", kind, place, "the trace", finished)


@pytest.fixture
def decide(tmp_path):
    """Return a function that decides on a failure as one agent, with its counts, and the restarts so far."""
    restarts = Restarts()

    def decision(failure, first=1, can_move=False, asked=False, limit=100, machine_limit=3):
        recovery = Recovery(tmp_path, SimpleNamespace(), limit, machine_limit, Limits(60, 60), can_move=can_move)
        restarts.began_at(first)
        return decide_restart(failure, recovery, restarts, asked, tmp_path / "logs")

    return decision


@pytest.mark.parametrize("kind", [MACHINE, PEER, JOB, SIGNAL, HANG])
def test_any_failure_is_worth_a_second_start_and_the_third_alike_none(decide, kind):
    assert [decide(failed(kind)) for _ in range(3)] == [None, None, 6]


def test_another_place_or_step_is_another_failure(decide):
    steps = [decide(failed(JOB, step)) for step in (7, 8, 7, 8, 7, 8)]
    places = [decide(failed(JOB, 9, place=place)) for place in "ababab"]
    assert steps == places == [None] * 6


def test_faults_of_the_machine_are_counted_until_a_start_continues_from_a_later_step(decide):
    """The failures happen at different steps, so that none is the same three times."""
    assert [decide(failed(MACHINE, step, host=f"n{step}")) for step in (2, 3, 4, 5)] == [None, None, None, 8]


def test_progress_renews_the_budget_of_the_machine(decide):
    found = [decide(failed(MACHINE, step, host=f"n{step}"), first=step - 1) for step in (2, 3, 4, 5, 6, 7, 8)]
    assert found == [None] * 7


def test_before_the_first_step_a_fault_of_the_machine_never_ends_with_6(decide):
    assert [decide(failed(MACHINE, 0, 0)) for _ in range(4)] == [None, None, None, 8]


def test_the_same_error_of_two_starts_before_any_step_is_a_defect(decide, capfd):
    assert decide(failed(JOB, 1, 0)) is None
    assert decide(failed(JOB, 1, 0)) == 1
    assert capfd.readouterr().err.count("the trace") == 2


@pytest.mark.parametrize("finished", [0, 3])
def test_memory_that_ran_out_is_worth_one_more_start_wherever_it_runs_out_next(decide, capfd, finished):
    """The end is one line with the advice; the stack trace is only in the rank's log."""
    assert decide(failed(MEMORY, 1, finished, "RuntimeError", "linear.py:35 in linear")) is None
    capfd.readouterr()
    assert decide(failed(MEMORY, 2, finished, "MemoryError", "gelu.py:9 in gelu")) == 6
    (told,) = capfd.readouterr().err.splitlines()
    assert "rank 1 on n1 ran out of memory at step 2 in forward: why; also after a fresh start" in told
    assert "lower train.micro_batch_size" in told and "rank_00001.log" in told


def test_memory_that_runs_out_again_after_progress_is_worth_another_start(decide, tmp_path):
    assert decide(failed(MEMORY, 7)) is None
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("save", 7)
    log.close()
    assert decide(failed(MEMORY, 9)) is None and decide(failed(MEMORY, 9)) == 6


def test_memory_that_ran_out_is_told_with_advice_where_restarts_are_switched_off(decide, capfd):
    assert decide(failed(MEMORY), limit=0) == 6
    (told,) = capfd.readouterr().err.splitlines()
    assert "resilience.max_restarts=0" in told and "lower train.micro_batch_size" in told


@pytest.mark.parametrize(("kind", "codes"), [(MACHINE, [None, None, 6]), (MEMORY, [None, 6]), (JOB, [None, None, 6])])
def test_numbers_in_a_message_make_no_other_failure(decide, kind, codes):
    """Sizes, addresses and process ids differ from start to start."""
    details = ("tried to allocate 402653184 bytes", "tried to allocate 268435456 bytes", "at 0x7f3a, pid 17")
    found = [decide(replace(failed(kind), detail=one)) for one, _ in zip(details, codes, strict=False)]
    assert found == codes


def test_a_different_error_before_any_step_is_tried_again(decide):
    assert [decide(failed(JOB, 1, 0, place=place)) for place in "abcd"] == [None] * 4


def test_a_job_that_was_asked_to_stop_is_not_started_again(decide):
    assert decide(failed(MACHINE), asked=True) == 8 and decide(failed(JOB, 2), asked=True) == 1


def test_restarts_can_be_switched_off(decide):
    assert decide(failed(JOB), limit=0) == 1 and decide(failed(HANG), limit=0) == 8
    assert decide(failed(MACHINE), machine_limit=0) == 8


def test_under_slurm_a_host_that_faults_twice_is_left(decide, capfd):
    assert decide(failed(MACHINE, 3), can_move=True) is None
    assert decide(failed(MACHINE, 4, host="n2"), can_move=True) is None
    assert decide(failed(MACHINE, 5), can_move=True) == 8
    assert "n1 has had faults of the machine more than once in a day" in capfd.readouterr().err


def test_a_host_is_suspected_by_its_own_faults_of_one_day(tmp_path):
    """A rank that lost a peer, or that a signal killed, says nothing of its host."""
    log = EventLog(tmp_path / "events.jsonl")
    for host, kind in [("a", MACHINE), ("b", MACHINE), ("b", MACHINE), ("c", PEER), ("c", PEER), ("d", JOB)]:
        log.emit("failure", 1, **failed(kind, host=host).event())
    log.close()
    events = read_events(tmp_path / "events.jsonl")
    now = seconds_of(events[0]["time"])
    assert suspects("abcd", events, now + 60) == ["b"]
    assert suspects("abcd", events, now + 25 * 3600) == []

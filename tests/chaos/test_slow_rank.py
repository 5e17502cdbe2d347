"""A rank that is slower than the others in a real job is named; the run's results do not change.

How small a slowness is named, and that noise names nobody, is tested on recorded times (test_stragglers.py): other
programs of a machine slow the ranks of a real job too.
"""

from __future__ import annotations

from support.commands import TWO_NATIVE, events, final_files, metrics, same
from support.faults import fault, run_with

LONG = [*TWO_NATIVE, "train.steps=130", "checkpoint.every=0", "train.eval_every=0"]
SLOW_FROM = 60


def test_a_rank_that_becomes_three_times_as_slow_is_named(workplace):
    """Rank 1's process is repeatedly stopped and continued."""
    assert run_with(workplace, [], *LONG, "run.name=alike").returncode == 0
    slow = [fault(1, SLOW_FROM, "forward", "slow", by=2)]
    done = run_with(workplace, slow, *LONG, "run.name=slow")
    assert done.returncode == 0, done.stderr
    told = events(workplace, "slow", "slow_rank")
    named = [event for event in told if event["rank"] == 1 and event["step"] > SLOW_FROM]
    assert named and named[0]["host"] and named[0]["ratio"] > 1.2, told
    assert f"rank 1 on {named[0]['host']} is slow, and all others wait for it" in done.stderr
    same(metrics(workplace, "slow"), metrics(workplace, "alike"))
    assert final_files(workplace, "slow") == final_files(workplace, "alike")

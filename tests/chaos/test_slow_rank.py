"""A rank that is slower than the others in a real job is named; the run's results do not change."""

from __future__ import annotations

from support.commands import TWO_NATIVE, events, final_files, metrics, same
from support.faults import fault, run_with

LONG = [*TWO_NATIVE, "train.steps=130", "checkpoint.every=0", "train.eval_every=0"]
SLOW_FROM = 60


def test_a_rank_slowed_by_30_percent_is_named_within_50_steps(workplace):
    """Rank 1's process is repeatedly stopped and continued; in a run of equal ranks none is named."""
    assert run_with(workplace, [], *LONG, "run.name=alike").returncode == 0
    assert events(workplace, "alike", "slow_rank") == []
    slow = [fault(1, SLOW_FROM, "forward", "slow", by=0.3)]
    done = run_with(workplace, slow, *LONG, "run.name=slow")
    assert done.returncode == 0, done.stderr
    (named,) = events(workplace, "slow", "slow_rank")
    assert named["rank"] == 1 and SLOW_FROM < named["step"] <= SLOW_FROM + 50, named
    assert 1.2 < named["ratio"] < 1.6 and named["host"], named
    assert f"rank 1 on {named['host']} is slow, and all others wait for it" in done.stderr
    same(metrics(workplace, "slow"), metrics(workplace, "alike"))
    assert final_files(workplace, "slow") == final_files(workplace, "alike")

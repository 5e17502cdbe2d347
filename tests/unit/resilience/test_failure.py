"""When another restart cannot help."""

from __future__ import annotations

from megatrain.resilience.failure import HANG, Failure, times_seen


def failure(how="SIGKILL", step=7, rank=0):
    return Failure(how, rank, step, "forward", "here")


def event(kind, step, **detail):
    return {"kind": kind, "step": step, **detail}


def test_the_same_failure_is_counted_across_restarts_and_jobs():
    """A failure is identified by what happened and where, on any rank; another failure or step starts a new count."""
    met = [event("start", 0), event("failure", 7, how="SIGKILL", rank=1), event("resume", 5)]
    assert times_seen(failure(), []) == 1
    assert times_seen(failure(), met) == 2
    assert times_seen(failure(), [*met, *met]) == 3
    assert times_seen(failure(step=8), [*met, *met]) == 1
    assert times_seen(failure("hang"), [*met, *met]) == 1
    assert times_seen(failure(), [*met, event("failure", 9, how="SIGKILL", rank=1)]) == 1


def test_a_checkpoint_beyond_a_failure_is_progress():
    """A run killed at a start, days apart, with progress in between, is not in a crash loop."""
    met = [event("failure", 0, how="SIGKILL"), event("resume", 100), event("save", 200)]
    assert times_seen(failure(step=0), [*met, *met]) == 1
    met = [event("resume", 5), event("save", 6), event("failure", 7, how="SIGKILL")]
    assert times_seen(failure(), [*met, *met]) == 3, "saving the same earlier checkpoint again is no progress"


def test_a_failure_says_what_and_where():
    assert str(failure()) == "rank 0 on here was killed by SIGKILL (out of memory, perhaps) at step 7 in forward"
    assert (
        str(Failure("hang", 1, 0, "start", "h", "x", kind=HANG))
        == "rank 1 on h hung in start, before its first step: x"
    )

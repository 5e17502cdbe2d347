"""Ranks that die, hang or crash again and again in a real job; the oracle is an undisturbed run."""

from __future__ import annotations

import pytest
from support.commands import TRAIN, TWO_NATIVE, events, final_files, metrics, same
from support.faults import fault, run_with

EVERY = 5
"""Steps between the job's saves (commands.TRAIN)."""


def test_a_rank_killed_anywhere_costs_a_restart_and_changes_nothing(workplace, undisturbed_native):
    """One job survives SIGKILL of each rank in forward, backward, update, evaluation and during a save."""
    places = [(2, "forward"), (7, "backward"), (13, "update")]
    deaths = [fault(rank, step + rank, phase, "SIGKILL") for step, phase in places for rank in (0, 1)]
    deaths += [fault(0, 20, "evaluate", "SIGKILL"), fault(0, 25, "save", "SIGKILL")]
    deaths += [fault(1, 30, "save", "SIGKILL"), fault(1, 40, "evaluate", "SIGKILL")]
    done = run_with(workplace, deaths, *TWO_NATIVE, "run.name=deaths")
    assert done.returncode == 0, done.stderr
    same(metrics(workplace, "deaths"), undisturbed_native)
    assert final_files(workplace, "deaths") == final_files(workplace, "undisturbed-native")
    failures = events(workplace, "deaths", "failure")
    assert {(f["rank"], f["step"], f["phase"]) for f in failures} == {
        (d["rank"], d["step"], d["phase"]) for d in deaths
    }
    assert len(failures) == len(deaths) and {f["how"] for f in failures} == {"SIGKILL"}
    for death in deaths:
        assert f"rank {death['rank']} on" in done.stderr
        assert (
            f"was killed by SIGKILL (out of memory, perhaps) at step {death['step']} in {death['phase']}" in done.stderr
        )
    resumed = [event["step"] for event in events(workplace, "deaths") if event["kind"] in ("resume", "start")][1:]
    assert all(f["step"] - at <= EVERY for f, at in zip(failures, resumed, strict=True)), (
        "more redone than a save apart"
    )


def test_the_third_identical_failure_at_the_same_step_ends_the_job(workplace):
    done = run_with(
        workplace,
        [fault(1, 8, "forward", "SIGSEGV", times=9)],
        *TWO_NATIVE, "run.name=loop",
    )  # fmt: skip
    assert done.returncode == 6, done.stderr
    assert [(f["step"], f["times"]) for f in events(workplace, "loop", "failure")] == [(8, 1), (8, 2), (8, 3)]
    assert "rank_00001.log" in done.stderr
    again = run_with(workplace, [], *TWO_NATIVE, "run.name=loop")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("do", "says", "engine"),
    [("SIGSTOP", "is stopped (SIGSTOP)", "deepspeed"), ("sleep", "waits for no one", "native")],
)
def test_a_rank_that_hangs_is_named_and_the_job_restarted(workplace, do, says, engine, request):
    """The hang is detected within twice the limit, every rank's stack and collective are recorded, and the run ends
    bit-identical."""
    expected = request.getfixturevalue("undisturbed" if engine == "deepspeed" else "undisturbed_native")
    limit = 8.0  # a busy machine once stalled for 4 seconds
    name = f"hang-{do}"
    done = run_with(
        workplace,
        [fault(1, 8, "backward", do)],
        *TRAIN, f"engine={engine}", f"run.name={name}", "launch.nproc_per_node=2", f"resilience.hang_timeout_s={limit}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same(metrics(workplace, name), expected)
    whole = "undisturbed" if engine == "deepspeed" else "undisturbed-native"
    assert final_files(workplace, name) == final_files(workplace, whole)
    innocent, culprit = sorted(events(workplace, name, "hang"), key=lambda event: event["rank"])
    assert culprit["guilty"] and not innocent["guilty"], (innocent, culprit)
    assert max(culprit["silent_s"], innocent["silent_s"]) < 2 * limit
    assert innocent["waits_in"] and f"{engine}.py" in innocent["at"] and "Thread" in innocent["stacks"]
    assert culprit["waits_in"] is None and (do == "SIGSTOP") == (culprit["stacks"] == "")
    (failure,) = events(workplace, name, "failure")
    assert failure["how"] == "hang" and failure["rank"] == 1 and says in failure["detail"]
    assert says in done.stderr

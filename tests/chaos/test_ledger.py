"""The goodput ledger of real jobs, compared with an outside clock and the run's events."""

from __future__ import annotations

import json
import time

import pytest
from support.commands import TWO_NATIVE, events
from support.faults import fault, run_with

from megatrain.report.run_page import report
from megatrain.resilience.ledger import summarise

OUTSIDE_S = 1.5
"""What the ledger cannot see of a command: the interpreter's exit, and starting a process of it.

0.81 s were seen on two cores with a load of six. A ledger that forgets the two seconds between the
commands, or a start, still fails.
"""


def timed(*arguments):
    started = time.monotonic()
    done = run_with(*arguments)
    return done, time.monotonic() - started


def test_every_second_of_a_job_with_two_deaths_and_a_requeue_is_accounted_for(workplace):
    """Two ranks are killed; the job is stopped by a signal, as before a time limit, and restarted a little later."""
    deaths = [fault(1, 8, "forward", "SIGKILL"), fault(0, 17, "backward", "SIGKILL"), fault(0, 24, "data", "SIGUSR1")]
    words = [*TWO_NATIVE, "run.name=booked", "checkpoint.every=5"]
    began = time.monotonic()
    stopped, first_s = timed(workplace, deaths, *words)
    assert stopped.returncode == 75, stopped.stderr
    time.sleep(2.0)
    done, second_s = timed(workplace, deaths, *words)
    wall = time.monotonic() - began
    assert done.returncode == 0, done.stderr

    document = json.loads((workplace / "runs/booked/ledger.json").read_text())
    first, second = document["agents"]
    assert first["seconds"] == pytest.approx(first_s, rel=0.01, abs=OUTSIDE_S)
    assert second["seconds"] == pytest.approx(second_s, rel=0.01, abs=OUTSIDE_S)
    assert [start["ended"] for start in first["starts"]] == ["SIGKILL", "SIGKILL", "saved"]
    assert [start["ended"] for start in second["starts"]] == ["done"]

    life = summarise(document)
    assert life.wall_s == pytest.approx(wall, rel=0.01, abs=OUTSIDE_S)
    seconds = life.seconds
    assert sum(seconds.values()) == pytest.approx(life.wall_s, rel=0.01)
    assert min(seconds.values()) >= 0 and seconds["compute"] > 0 and seconds["communication"] > 0
    assert seconds["idle"] > 2.0, "from the saved run to the next command"
    assert min(seconds[name] for name in ("downtime", "lost work", "start-up", "load")) > 0
    assert (life.num_starts, life.failures) == (4, 2)
    resumed = [event["step"] for event in events(workplace, "booked", "resume")]
    failed = [event["step"] for event in events(workplace, "booked", "failure")]
    assert life.lost_steps == sum(at - 1 - to for at, to in zip(failed, resumed[:2], strict=True))
    assert 0 < life.goodput < 1

    page = report(workplace / "runs/booked").read_text()
    assert '"lost work"' in page and "4 starts of the ranks, 2 failures" in page

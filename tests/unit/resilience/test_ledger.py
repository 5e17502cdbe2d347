"""The goodput ledger: all time is accounted for, and lost work is counted."""

from __future__ import annotations

import json
import time

import pytest

from megatrain.errors import OwnedError
from megatrain.resilience import ledger as module
from megatrain.resilience.heartbeat import WAITED, Heartbeat, Heartbeats
from megatrain.resilience.ledger import CATEGORIES, EFFECTIVE, Ledger, process_age, read_ledger, summarise


@pytest.fixture
def heartbeats():
    beats = Heartbeats(1)
    yield beats
    beats.close()


def make(tmp_path, heartbeats, since=None, may_write=lambda: None):
    return Ledger(tmp_path / "ledger.json", heartbeats, may_write, since)


def train(heartbeat, *steps, nap=0.004):
    """Mark the phases of a trainer and its engine, each for a short time."""
    for step in steps:
        for phase in ("data", "exchange", "forward", "backward", "update"):
            heartbeat.enter(phase, step)
            time.sleep(nap)


def check(document):
    """Check that no time is missing or counted twice."""
    life = summarise(document)
    assert sum(life.seconds.values()) == pytest.approx(life.wall_s, rel=0.01, abs=0.002)
    assert min(life.seconds.values()) >= 0
    for before, after in zip(life.spans, life.spans[1:], strict=False):
        assert after.start_s == pytest.approx(before.stop_s)
    assert all(sum(span.seconds.values()) == pytest.approx(span.stop_s - span.start_s, abs=0.01) for span in life.spans)
    return life


def test_a_job_with_a_death_adds_up_to_its_wall_time(tmp_path, heartbeats):
    """The rank is killed in the middle of a phase and the agent notices later: repeated steps count as lost work, the
    time between as downtime."""
    began = time.monotonic()
    ledger = make(tmp_path, heartbeats)
    time.sleep(0.05)
    heartbeats.clear()
    ledger.begin()
    rank = Heartbeat(heartbeats.file, 0)
    time.sleep(0.05)
    rank.enter("load")
    time.sleep(0.03)
    train(rank, 1, 2, 3, 4)
    rank.enter("save", 4)
    time.sleep(0.02)
    train(rank, 5, 6, 7)
    rank.enter("data", 8)
    rank.enter("forward")
    time.sleep(0.1)  # and is killed here
    ledger.freeze()
    time.sleep(0.08)
    ledger.end("SIGKILL")
    heartbeats.clear()
    ledger.begin()
    rank = Heartbeat(heartbeats.file, 0)
    train(rank, 5, 6, 7, 8)
    rank.enter("end", 8)
    time.sleep(0.02)
    ledger.end("done")
    time.sleep(0.02)
    ledger.close()
    wall = time.monotonic() - began

    document = read_ledger(tmp_path / "ledger.json")
    life = check(document)
    assert life.wall_s == pytest.approx(wall, rel=0.01, abs=0.05)
    first, second = document["agents"][0]["starts"]
    assert (first["first"], first["done"], first["finished"], first["ended"]) == (1, 7, 7, "SIGKILL")
    assert (second["first"], second["done"], second["finished"], second["ended"]) == (5, 8, 4, "done")
    assert (life.lost_steps, life.num_starts, life.failures) == (3, 2, 1)
    seconds = life.seconds
    assert seconds["lost work"] >= 0.1 + 3 * 5 * 0.004, "three finished steps and an unfinished one"
    assert sum(seconds[name] for name in EFFECTIVE) >= 8 * 5 * 0.004, "eight steps count in the end"
    assert seconds["downtime"] >= 0.08 and seconds["load"] >= 0.03 and seconds["save"] >= 0.02
    assert seconds["start-up"] >= 0.1 and seconds["end"] >= 0.04
    assert life.mtbf_s == pytest.approx(first["to_s"] - first["from_s"] + second["to_s"] - second["from_s"])
    assert life.goodput == pytest.approx(sum(seconds[name] for name in EFFECTIVE) / life.wall_s)


def test_waits_count_as_communication(tmp_path, heartbeats):
    ledger = make(tmp_path, heartbeats)
    heartbeats.clear()
    ledger.begin()
    rank = Heartbeat(heartbeats.file, 0)
    times = [time.monotonic()]

    def note():
        times.append(time.monotonic())

    rank.enter("data", 1)
    rank.enter("forward")
    note()
    time.sleep(0.05)
    rank.waited(30_000_000)
    note()
    rank.enter("exchange")
    note()
    rank.waited(10_000_000)  # already communication as a whole
    time.sleep(0.02)
    note()
    rank.beat()
    ledger.end("saved")
    note()
    account = heartbeats.account(0)
    assert account.seconds[WAITED] == pytest.approx(0.03)
    seconds = check(read_ledger(tmp_path / "ledger.json")).seconds
    before, forward, waited, exchange, beat, end = times
    slack = 0.002
    assert beat - exchange - slack < seconds["communication"] - 0.03 < end - waited + slack
    assert waited - forward - slack < seconds["compute"] + 0.03 < exchange - before + slack


def test_the_time_of_a_hang_is_downtime(tmp_path, heartbeats):
    """The time after the last sign of life counts as downtime, not as work."""
    ledger = make(tmp_path, heartbeats)
    heartbeats.clear()
    ledger.begin()
    rank = Heartbeat(heartbeats.file, 0)
    train(rank, 1, 2)
    time.sleep(0.2)
    ledger.freeze(hung=True)
    ledger.end("hang")
    ledger.close()
    life = check(read_ledger(tmp_path / "ledger.json"))
    assert life.seconds["downtime"] >= 0.2 and life.seconds["compute"] < 0.1 and life.failures == 1


def test_steps_repeated_after_a_rollback_are_lost_work(tmp_path, heartbeats):
    ledger = make(tmp_path, heartbeats)
    heartbeats.clear()
    ledger.begin()
    rank = Heartbeat(heartbeats.file, 0)
    train(rank, 1, 2, 3, 4, 5)
    rank.enter("load")
    rank.enter("save", 2)
    train(rank, 3, 4, 5, 6)
    rank.enter("save", 6)
    rank.enter("end", 6)
    ledger.end("done")
    document = read_ledger(tmp_path / "ledger.json")
    (start,) = document["agents"][0]["starts"]
    assert (start["finished"], start["done"]) == (9, 6)
    life = check(document)
    effective = sum(life.seconds[name] for name in EFFECTIVE)
    assert life.lost_steps == 3 and life.seconds["lost work"] == pytest.approx(effective * 3 / 6, rel=0.01)


def test_a_stop_by_a_signal_loses_nothing(tmp_path, heartbeats):
    """The batch fetched for the next step is not trained on, and the last step counts once."""
    ledger = make(tmp_path, heartbeats)
    heartbeats.clear()
    ledger.begin()
    rank = Heartbeat(heartbeats.file, 0)
    train(rank, 1, 2, 3)
    rank.enter("data", 4)
    rank.enter("exchange", 4)
    rank.enter("save", 3)
    rank.enter("end", 3)
    ledger.end("saved")
    life = check(read_ledger(tmp_path / "ledger.json"))
    assert (
        [span.steps for span in life.spans if span.steps] == [(1, 3)]
        and life.lost_steps == 0
        and life.seconds["lost work"] == 0
    )


def test_a_power_cut_costs_only_the_time_not_yet_written(tmp_path, heartbeats, monkeypatch):
    """The gap to the next agent is downtime by the wall clock; if the clock was set back, it is 0, never negative."""
    monkeypatch.setattr(module, "EVERY_S", 0.1)
    ledger = make(tmp_path, heartbeats)
    heartbeats.clear()
    ledger.begin()
    rank = Heartbeat(heartbeats.file, 0)
    train(rank, 1, 2, 3, 4, nap=0.01)
    rank.enter("data", 5)
    time.sleep(0.05)
    ledger.watch()
    written = (tmp_path / "ledger.json").read_text()
    ledger.watch()
    assert (tmp_path / "ledger.json").read_text() == written, "the ledger is not written at every look"
    time.sleep(0.3)  # the power goes, and comes back
    ledger = make(tmp_path, heartbeats)
    heartbeats.clear()
    ledger.begin()
    train(Heartbeat(heartbeats.file, 0), 4, 5)
    ledger.end("exit code 1")
    ledger.close()
    document = read_ledger(tmp_path / "ledger.json")
    life = check(document)
    assert life.seconds["downtime"] >= 0.3 and (life.failures, life.lost_steps) == (2, 1)
    document["agents"][1]["began"] -= 3600
    assert check(document).wall_s == pytest.approx(sum(agent["seconds"] for agent in document["agents"]))


def test_a_running_job_has_lost_nothing_yet(tmp_path, heartbeats):
    ledger = make(tmp_path, heartbeats)
    heartbeats.clear()
    ledger.begin()
    train(Heartbeat(heartbeats.file, 0), 1, 2)
    ledger._book(ledger._now())
    ledger._write()
    life = check(read_ledger(tmp_path / "ledger.json"))
    assert life.failures == 0 and life.seconds["lost work"] == 0 and life.mtbf_s is None


def test_an_agent_that_no_longer_owns_the_run_writes_nothing(tmp_path, heartbeats):
    def refuse():
        raise OwnedError("another job")

    make(tmp_path, heartbeats, may_write=refuse).close()
    assert not (tmp_path / "ledger.json").exists()


def test_a_damaged_ledger_is_set_aside(tmp_path, heartbeats):
    (tmp_path / "ledger.json").write_text('{"format": 1, "agents": [{')
    make(tmp_path, heartbeats).close()
    assert len(read_ledger(tmp_path / "ledger.json")["agents"]) == 1
    assert (tmp_path / "ledger.json.damaged").exists()
    (tmp_path / "ledger.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="format 1"):
        read_ledger(tmp_path / "ledger.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 1, "agents": [1]}',
        '{"format": 1, "agents": [{"began": 1, "seconds": 2, "starts": null}]}',
        '{"format": 1, "agents": [{"began": 1, "seconds": %s, "starts": []}]}' % ("9" * 400),
        "[" * 100_000,
        None,
    ],
)
def test_an_inconsistent_ledger_is_set_aside_with_a_warning(tmp_path, heartbeats, capsys, text):
    if text is None:
        (tmp_path / "ledger.json").mkdir()
    else:
        (tmp_path / "ledger.json").write_text(text)
    make(tmp_path, heartbeats, since=time.monotonic() - 5).close()  # an agent without any time has no span
    assert len(check(read_ledger(tmp_path / "ledger.json")).spans) == 1
    assert "ledger.json is damaged and was renamed to ledger.json.damaged" in capsys.readouterr().err


def test_the_time_of_an_agent_without_ranks_is_start_up(tmp_path, heartbeats):
    make(tmp_path, heartbeats, since=time.monotonic() - 5).close()
    life = check(read_ledger(tmp_path / "ledger.json"))
    assert life.seconds["start-up"] == pytest.approx(5, abs=0.2) and set(life.seconds) == set(CATEGORIES)
    assert summarise({"format": 1, "agents": []}).wall_s == 0


def agent_of(began, seconds, ended, steps=0, slurm_job=None):
    """An agent that ran its ranks once, for all but its first and its last second."""
    trained = {"first": 1, "done": steps, "finished": steps} if steps else {"first": 0, "done": 0, "finished": 0}
    spent = {"start": 1.0, "forward": seconds - 3.0} if steps else {"start": seconds - 2.0}
    start = {"from_s": 1.0, "to_s": seconds - 1.0, "ended": ended, "seconds": spent, "unfinished": {}} | trained
    return {"began": 1e9 + began, "seconds": seconds, "slurm_job": slurm_job, "starts": [start]}


@pytest.mark.parametrize("ended", ["exit code 2", "exit code 3", "exit code 4", "exit code 7", "done"])
@pytest.mark.parametrize("how", ["done", "saved", "interrupted"])
def test_a_refused_command_after_a_run_and_the_time_before_it_are_idle(how, ended):
    """Neither changes the effective training time, the failures or the number of starts, wherever they come."""
    run = agent_of(0, 100, how, steps=10)
    alone = check({"format": 1, "agents": [run]})
    refused = [agent_of(3600, 20, ended), agent_of(9000, 20, ended)]
    life = check({"format": 1, "agents": [agent_of(-500, 20, ended), run, *refused]})
    assert (life.goodput, life.failures, life.mtbf_s, life.num_starts) == (alone.goodput, 0, None, 1)
    assert life.seconds == {**alone.seconds, "idle": 500 + 9020 - 100} and life.busy_s == 100
    assert [span.ended for span in life.spans if span.ended] == [ended, how, ended, ended]


def test_the_time_before_the_next_command_is_downtime_only_if_the_run_wanted_to_go_on():
    """After a failure, a refused command in between does not make it idle; nor is a requeued job's queue."""
    failed = [agent_of(0, 100, "SIGKILL", 10), agent_of(200, 20, "exit code 2"), agent_of(300, 100, "done", 20)]
    life = check({"format": 1, "agents": failed})
    assert life.seconds["downtime"] == 201 and life.seconds["idle"] == 0
    assert (life.failures, life.num_starts, life.mtbf_s) == (1, 2, 196.0)
    for job, category in (("7", "downtime"), ("8", "idle"), (None, "idle")):
        saved = [agent_of(0, 100, "saved", 10, "7"), agent_of(300, 100, "done", 20, job)]
        seconds = check({"format": 1, "agents": saved}).seconds
        assert seconds["downtime"] + seconds["idle"] == seconds[category] == 200
    crashed = [agent_of(0, 100, "exit code 1"), agent_of(300, 100, "done", 20)]
    life = check({"format": 1, "agents": crashed})
    assert life.failures == 1 and life.seconds["idle"] == 0, "a defect or a fault of the machine is no refusal"


def test_the_age_of_a_process_is_the_time_since_its_start():
    import subprocess
    import sys

    code = "import time; time.sleep(1); from megatrain.resilience.ledger import process_age as age; print(age())"
    started = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1.0 < age < time.monotonic() - started + 0.1
    assert process_age() > 0

"""What an agent does with its copies in memory when the job ends."""

from __future__ import annotations

import shutil

import pytest

from megatrain.checkpoint import rescue
from megatrain.checkpoint.manifest import Manifest, write_manifest
from megatrain.errors import EXIT_NO_PROGRESS
from megatrain.launch.agent import Agent
from megatrain.launch.nodes import SingleNode
from megatrain.launch.recovery import Recovery, Restarts, decide_restart
from megatrain.resilience.failure import Failure
from megatrain.resilience.owner import FOLDER, Ownership
from megatrain.resilience.watchdog import Limits


class Counting(SingleNode):
    """Counts the exchanges with the other agents."""

    exchanges = 0

    def all_gather(self, value):
        self.exchanges += 1
        return super().all_gather(value)


@pytest.mark.parametrize("fails", ["disk", "owner"])
def test_a_node_that_cannot_rescue_its_part_still_answers_the_others(fails, tmp_path, monkeypatch, capfd):
    """They wait for it, and its leaving would be taken for its death: exit code 8 in the place of the job's own."""
    owner = Ownership.take(tmp_path)
    recovery = Recovery(tmp_path, owner, 2, 2, Limits(60, 60), copies=True)
    peers = Counting()
    agent = Agent([], 1, tmp_path / "logs", recovery, peers)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    try:
        if fails == "disk":
            monkeypatch.setattr(agent.copies, "rescue", refuse)
        else:
            (tmp_path / FOLDER / "00000002.json").write_text("{}")
        agent.rescue_copies(EXIT_NO_PROGRESS)
        assert peers.exchanges == 1
        assert "could not be written to disk" in capfd.readouterr().err
    finally:
        agent.close()


@pytest.mark.parametrize("cleared", ["before", "while locked"])
def test_two_agents_that_start_at_once_on_a_machine_do_not_stop_each_other(cleared, tmp_path, monkeypatch):
    """One takes the other's new folder, which is not marked yet, for a killed one's."""
    lock, met = rescue._lock, []

    def raced(folder):
        number = lock(folder) if cleared == "while locked" else None
        if not met:
            met.append(folder)
            shutil.rmtree(folder)
        return lock(folder) if number is None else number

    monkeypatch.setattr(rescue, "_MEMORY", tmp_path)
    monkeypatch.setattr(rescue, "_lock", raced)
    copies = rescue.Copies()
    assert copies.folder != met[0] and (copies.folder / rescue.OWN).is_dir()
    copies.close()


def test_a_disk_that_takes_no_events_does_not_end_the_agent(tmp_path, capfd):
    """It holds the copies, and starts the ranks again."""
    recovery = Recovery(tmp_path, Ownership.take(tmp_path), 2, 2, Limits(60, 60), copies=True)
    (tmp_path / "events.jsonl").mkdir()
    failure = Failure("SIGKILL", 0, 7, "forward", "here")
    assert decide_restart(failure, recovery, Restarts(), stop_requested=False, log_dir=tmp_path / "logs") is None
    assert "it lacks: failure at step 7" in capfd.readouterr().err


def test_a_whole_checkpoint_among_the_rescued_parts_is_named_and_passed_over(tmp_path):
    part = tmp_path / "rescued" / "step_00000005" / "node_00000"
    part.mkdir(parents=True)
    write_manifest(part, Manifest())
    made, (problem,) = rescue.assemble(tmp_path)
    assert made is None and problem == f"{part} is a whole checkpoint, not a node's part of one"

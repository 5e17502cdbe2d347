"""What an agent does with its copies in memory when the job ends."""

from __future__ import annotations

import pytest

from megatrain.errors import EXIT_NO_PROGRESS
from megatrain.launch import local
from megatrain.launch.peers import Alone
from megatrain.resilience.owner import FOLDER, Ownership
from megatrain.resilience.watchdog import Limits


class Counting(Alone):
    """Counts how often one has shared."""

    shares = 0

    def share(self, value):
        self.shares += 1
        return super().share(value)


@pytest.mark.parametrize("fails", ["disk", "owner"])
def test_a_node_that_cannot_rescue_its_part_still_answers_the_others(fails, tmp_path, monkeypatch, capfd):
    """They wait for it, and its leaving would be taken for its death: exit code 8 in the place of the job's own."""
    owner = Ownership.take(tmp_path)
    recovery = local.Recovery(tmp_path, owner, 2, Limits(60, 60), copies=True)
    peers = Counting()
    agent = local._Agent([], 1, tmp_path / "logs", recovery, peers)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    try:
        if fails == "disk":
            monkeypatch.setattr(agent.copies, "rescue", refuse)
        else:
            (tmp_path / FOLDER / "00000002.json").write_text("{}")
        agent._rescue(EXIT_NO_PROGRESS)
        assert peers.shares == 1
        assert "could not be brought to the disk" in capfd.readouterr().err
    finally:
        agent.close()

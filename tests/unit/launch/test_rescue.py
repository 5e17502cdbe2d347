"""What an agent does with its copies in memory when the job ends."""

from __future__ import annotations

import fcntl
import os
import tempfile

import pytest

from megatrain.checkpoint import rescue
from megatrain.checkpoint.manifest import FORMAT_VERSION, MANIFEST, manifest_hash, write_json
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


def test_a_folder_that_another_starting_agent_took_for_one_left_behind_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(rescue, "_MEMORY", tmp_path)
    made, make = [], tempfile.mkdtemp

    def disturbed(**words):
        made.append(make(**words))
        if len(made) == 1:
            os.rmdir(made[0])
        elif len(made) == 2:
            made.append(os.open(made[1], os.O_RDONLY))
            fcntl.flock(made[2], fcntl.LOCK_EX)
        return made[-1] if len(made) != 3 else made[1]

    monkeypatch.setattr(rescue.tempfile, "mkdtemp", disturbed)
    copies = rescue.Copies()
    assert str(copies.folder) == made[-1] and (copies.folder / "own").is_dir()
    copies.close()
    os.close(made[2])


def test_a_whole_checkpoint_among_the_rescued_parts_is_named_and_passed_over(tmp_path):
    part = tmp_path / "rescued" / "step_00000005" / "node_00000"
    part.mkdir(parents=True)
    document = {"format": FORMAT_VERSION, "files": {}, "tensors": {}}
    write_json(part / MANIFEST, {**document, "checksum": manifest_hash(document)})
    made, (problem,) = rescue.assemble(tmp_path)
    assert made is None and problem == f"{part} is a checkpoint, and no node's part of one"

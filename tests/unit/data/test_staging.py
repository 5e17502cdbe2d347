"""A dataset's staging folder has one owner, also across machines, and leaves nothing behind but work to go on from."""

import json
import os

import pytest

from megatrain.data.staging import StagingFolder
from megatrain.errors import OwnedError
from megatrain.resilience import owner


def owner_files(folder):
    return sorted((folder / ".d.preparing" / "owner").glob("*.json"))


@pytest.fixture
def quick(monkeypatch):
    """Shorten the heartbeat and the watch over another machine's owner."""
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    take = owner.Ownership.take
    monkeypatch.setattr(owner.Ownership, "take", lambda folder, **keys: take(folder, watch_s=0.5, **keys))


def on_another_machine(path):
    """Let an owner file be one of another machine."""
    beaten = path.stat().st_mtime_ns
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "elsewhere", "host": "n7"}))
    os.utime(path, ns=(beaten, beaten))


def test_an_owner_of_another_machine_that_is_alive_is_named_and_one_that_is_gone_is_succeeded(tmp_path, quick):
    with StagingFolder(tmp_path / "d") as first:
        first.work.joinpath("stage").mkdir()
        first.work.joinpath("stage", "part.json").write_text("{}")
        on_another_machine(owner_files(tmp_path)[-1])
        with pytest.raises(OwnedError, match=r"belongs to another job: host n7.*use another data.name"):
            StagingFolder(tmp_path / "d").__enter__()  # its heartbeat is seen
        first._beating.close()  # as if it were killed
        with StagingFolder(tmp_path / "d") as second:
            assert second.work.joinpath("stage", "part.json").exists(), "it goes on from what is finished"
            first.folder.joinpath("file").write_text("late")
            with pytest.raises(OwnedError, match="was taken over"):
                first.publish()
            second.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_only_finished_work_is_left_of_a_preparation_that_failed(tmp_path):
    for makes_work in (False, True):
        with pytest.raises(KeyError), StagingFolder(tmp_path / "d") as folder:
            folder.folder.joinpath("half.bin").write_text("half")
            if makes_work:
                folder.work.joinpath("stage").mkdir()
                folder.work.joinpath("stage", "part.json").write_text("{}")
            raise KeyError
        assert (tmp_path / ".d.preparing").exists() == makes_work
    with StagingFolder(tmp_path / "d") as folder:
        assert list(folder.folder.iterdir()) == [] and folder.has_work()
        folder.folder.joinpath("whole").write_text("whole")
        folder.publish()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["d", "d/whole"]

"""Saving in the background: what is written is what was, one save at a time, and a disk that refuses is tried again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.records import at

from megatrain.checkpoint.piece import Piece
from megatrain.checkpoint.saver import Saver, Staging
from megatrain.checkpoint.store import CheckpointStore, load_into
from megatrain.config import CheckpointConfig
from megatrain.distributed.world import World
from megatrain.errors import EnvironmentFault, OwnedError

WORLD = World(0, 1, 0, torch.device("cpu"), None)


class SlowStore(CheckpointStore):
    """A real store whose writes wait for `gate`, and fail while `refusing` holds something to raise."""

    def __init__(self, folder, refusing=()):
        super().__init__(folder, WORLD)
        self.gate, self.began = threading.Event(), threading.Event()
        self.refusing, self.tried = list(refusing), []

    def save(self, state, record):
        self.began.set()
        assert self.gate.wait(20)
        self.tried.append(record.progress.step)
        if self.refusing:
            raise self.refusing.pop(0)
        return super().save(state, record)


def saver(store, **changes):
    config = CheckpointConfig(keep=2, retry_wait_s=0.0)
    for name, value in changes.items():
        setattr(config, name, value)
    return Saver(store, config)


def kinds(found):
    return [(kind, step) for kind, step, _ in found]


def full():
    return EnvironmentFault("no room")


def test_training_goes_on_and_what_is_written_is_what_was(tmp_path):
    store = SlowStore(tmp_path / "checkpoints")
    saving = saver(store)
    weights, flat = torch.arange(6.0), torch.arange(12.0)
    saving.save({"model.w": weights, "model.p": Piece(flat, 0, (4, 3))}, at(3))
    assert store.began.wait(20) and saving.reports() == []
    weights.zero_()
    flat.zero_()
    store.gate.set()
    saving.finish()
    ((kind, step, detail),) = saving.reports()
    assert (kind, step, Path(detail["checkpoint"]).name) == ("save", 3, "step_00000003")
    assert detail["stall_s"] < detail["seconds"] + 20 and detail["waited_s"] >= 0
    folder, manifest = store.newest_valid()
    loaded = {"model.w": torch.empty(6), "model.p": torch.empty(4, 3)}
    load_into(folder, manifest, loaded, None)
    assert torch.equal(loaded["model.w"], torch.arange(6.0))
    assert torch.equal(loaded["model.p"].flatten(), torch.arange(12.0))


def test_a_second_save_never_overtakes_the_first(tmp_path):
    store = SlowStore(tmp_path / "checkpoints")
    saving = saver(store)
    saving.save({"model.w": torch.ones(2)}, at(1))
    second = threading.Thread(target=saving.save, args=({"model.w": torch.full((2,), 2.0)}, at(2)))
    second.start()
    second.join(0.3)
    assert second.is_alive() and store.tried == []
    store.gate.set()
    second.join(20)
    saving.finish()
    assert store.tried == [1, 2] and kinds(saving.reports()) == [("save", 1), ("save", 2)]
    for folder, value in zip(sorted(store.folder.iterdir()), (1.0, 2.0), strict=True):
        loaded = {"model.w": torch.empty(2)}
        load_into(folder, store.newest_valid()[1], loaded, None)
        assert torch.equal(loaded["model.w"], torch.full((2,), value))


def test_a_failed_write_is_told_and_tried_again(tmp_path):
    store = SlowStore(tmp_path / "checkpoints", [full(), full()])
    store.gate.set()
    saving = saver(store)
    saving.save({"model.w": torch.ones(2)}, at(1))
    saving.finish()
    assert kinds(saving.reports()) == [("save_failed", 1), ("save_failed", 1), ("save", 1)]
    assert not saving.has_failed and [path.name for path in store.folder.iterdir()] == ["step_00000001"]


def test_a_newer_save_takes_the_place_of_one_that_waits(tmp_path):
    store = SlowStore(tmp_path / "checkpoints", [full()])
    store.gate.set()
    saving = saver(store, retry_wait_s=60.0)
    saving.save({"model.w": torch.ones(2)}, at(1))
    assert saving.save({"model.w": torch.ones(2)}, at(2)) < 30
    saving.finish()
    assert kinds(saving.reports()) == [("save_failed", 1), ("save", 2)] and store.tried == [1, 2]


def test_after_too_many_failures_in_a_row_it_gives_up(tmp_path):
    """Counted over saves; a success begins anew."""
    store = SlowStore(tmp_path / "checkpoints", [full(), full(), full(), full()])
    store.gate.set()
    saving = saver(store, retries=3)
    saving.save({"model.w": torch.ones(2)}, at(1))
    with pytest.raises(EnvironmentFault, match=r"4 saves in a row have failed \(checkpoint.retries=3\): no room"):
        saving.finish()
    assert saving.has_failed and kinds(saving.reports()) == [("save_failed", 1)] * 4


def test_what_is_no_fault_of_the_disk_ends_the_run_at_once(tmp_path):
    store = SlowStore(tmp_path / "checkpoints", [OwnedError("another")])
    store.gate.set()
    saving = saver(store)
    saving.save({"model.w": torch.ones(2)}, at(1))
    with pytest.raises(OwnedError, match="another"):
        saving.finish()


def test_in_the_foreground_it_waits(tmp_path):
    store = SlowStore(tmp_path / "checkpoints")
    store.gate.set()
    saving = saver(store, background=False)
    saving.save({"model.w": torch.ones(2)}, at(1))
    assert kinds(saving.reports()) == [("save", 1)]


def test_old_checkpoints_are_retired(tmp_path):
    store = SlowStore(tmp_path / "checkpoints")
    store.gate.set()
    saving = saver(store)
    for step in (1, 2, 3):
        saving.save({"model.w": torch.ones(2)}, at(step))
    saving.finish()
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_00000002", "step_00000003"]


def test_the_memory_of_a_copy_is_used_again():
    staging = Staging()
    first: Any = staging.copy({"a": torch.ones(3), "p": Piece(torch.ones(4), 0, (4,))})
    places = [first["a"].data_ptr(), first["p"].flat.data_ptr()]
    again: Any = staging.copy({"a": torch.zeros(3), "p": Piece(torch.zeros(4), 0, (4,))})
    assert [again["a"].data_ptr(), again["p"].flat.data_ptr()] == places and not again["a"].any()
    assert staging.copy({"a": torch.zeros(5)})["a"].shape == (5,)


def test_a_copy_takes_the_bytes_of_its_state():
    """An allocator that rounds each tensor up to a power of two would take almost twice as much."""
    state = {"odd": torch.ones(3, dtype=torch.uint8), "scalar": torch.tensor(3)}
    state |= {f"t{n}": torch.full((2**n + 1,), float(n)) for n in range(4, 12)}
    copied = Staging().copy(state)
    assert all(torch.equal(copied[name], state[name]) for name in state)
    blocks = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in copied.values()}
    wanted = sum(tensor.nbytes for tensor in state.values())
    assert len(blocks) == 1 and wanted <= sum(blocks.values()) <= wanted + 64 * len(state)


def test_a_wait_for_a_slow_save_is_told_and_a_short_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("megatrain.checkpoint.saver.TELL_S", 0.01)
    store, waited = SlowStore(tmp_path), []

    def tell(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            store.gate.set()

    saving = Saver(store, CheckpointConfig(), waiting=tell)
    saving.save({"model.w": torch.zeros(1)}, at(1))
    saving.finish()
    assert len(waited) >= 3 and waited == sorted(waited) and store.tried == [1]
    told = len(waited)
    saving.finish()
    assert len(waited) == told, "nothing is pending, so nothing is told"

"""Each kind of damage is refused by name, an older valid checkpoint is used, and the last valid one is kept."""

import errno
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.records import at

from megatrain.checkpoint.manifest import (
    MANIFEST,
    EarlyStop,
    Manifest,
    check_coverage,
    file_hash,
    manifest_hash,
)
from megatrain.checkpoint.store import CheckpointStore, load_into, load_weights, verify
from megatrain.distributed.world import World
from megatrain.errors import CheckpointError, ConfigError, EnvironmentFault

torch.set_num_threads(1)
SHARD = "0.safetensors"


def state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a.weight": torch.randn(6, 4, generator=generator),
        "model.b.weight": torch.randn(5, generator=generator),
        "model.scale": torch.tensor(float(step)),
        "optim.exp_avg.a.weight": torch.randn(6, 4, generator=generator),
    }


@pytest.fixture
def store(tmp_path):
    """A run's checkpoints at steps 10, 20 and 30, in a store that has just been opened."""
    first = CheckpointStore(tmp_path / "checkpoints", World(0, 1, 0, torch.device("cpu"), None))
    for step in (10, 20, 30):
        first.save(state(step), at(step))
    return reopen(first.folder)


def reopen(folder: Path) -> Any:
    """The store as a run that starts on `folder` has it; `skips` collects what it reports."""
    opened: Any = CheckpointStore(folder, World(0, 1, 0, torch.device("cpu"), None))
    opened.skips = []
    opened.report = lambda kind, **detail: opened.skips.append((kind, detail))
    return opened


def names(store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def cut(folder):
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-1])


def flip(folder):
    data = bytearray((folder / SHARD).read_bytes())
    data[-3] ^= 1
    (folder / SHARD).write_bytes(data)


def swap_for_other_step(folder):
    shutil.copyfile(folder.with_name("step_00000010") / SHARD, folder / SHARD)


def replace_by_folder(folder):
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()


def edit(change):
    """A damage that alters the manifest without sealing it anew."""

    def damage(folder):
        document = json.loads((folder / MANIFEST).read_text())
        change(document)
        (folder / MANIFEST).write_text(json.dumps(document))

    return damage


def reseal(folder, change):
    """Alter a manifest and give it a checksum that matches, as a faulty writer would."""
    document = json.loads((folder / MANIFEST).read_text())
    change(document)
    document["checksum"] = manifest_hash(document)
    (folder / MANIFEST).write_text(json.dumps(document))


def a_chunks(document):
    return document["tensors"]["model.a.weight"]["chunks"]


def halves(document, first, second):
    """Two chunks in place of tensor a's one: rows [first), rows [second)."""
    file = a_chunks(document)[0]["file"]
    a_chunks(document)[:] = [
        {"offset": [low, 0], "size": [high - low, 4], "file": file} for low, high in (first, second)
    ]


DAMAGES = {
    "shard cut": (cut, SHARD, "were written"),
    "shard with one bit flipped": (flip, SHARD, "checksum"),
    "shard of another step": (swap_for_other_step, SHARD, "checksum"),
    "shard missing": (lambda folder: (folder / SHARD).unlink(), SHARD, "No such file"),
    "shard a folder": (replace_by_folder, SHARD, "were written|directory"),
    "manifest missing": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST, "not a checkpoint"),
    "manifest empty": (lambda folder: (folder / MANIFEST).write_text(""), MANIFEST, "cannot be read as JSON"),
    "manifest cut": (
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20]),
        MANIFEST,
        "cannot be read as JSON",
    ),
    "manifest not UTF-8": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff{}"), MANIFEST, "cannot be read"),
    "manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("[1]"), MANIFEST, "not a megatrain"),
    "manifest altered": (edit(lambda document: document.update(step=31)), MANIFEST, "own checksum"),
    "manifest of a later format": (edit(lambda document: document.update(format=2)), MANIFEST, "format 2"),
    "chunk missing": (edit(lambda document: a_chunks(document).clear()), MANIFEST, "own checksum"),
}


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_damage_is_named_and_the_checkpoint_before_is_used(store, kind):
    damage, file, message = DAMAGES[kind]
    newest = store.folder / "step_00000030"
    damage(newest)
    with pytest.raises(CheckpointError, match=message) as caught:
        verify(newest)
    assert file in str(caught.value) and "step_00000030" in str(caught.value)
    folder, manifest = store.newest_valid()
    assert (folder.name, manifest.step) == ("step_00000020", 20)
    assert [(kind, Path(detail["checkpoint"]).name) for kind, detail in store.skips] == [("skip", "step_00000030")]
    weights = load_weights(folder, manifest)
    assert torch.equal(weights["a.weight"], state(20)["model.a.weight"])


def test_every_damaged_file_is_named(store):
    folder = store.folder / "step_00000030"

    def second_file(document):
        document["files"]["1.safetensors"] = {"size": 1, "xxh3": "0"}

    reseal(folder, second_file)
    cut(folder)
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert SHARD in str(caught.value) and "1.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: a_chunks(document).clear(), "holds 0 of its 24"),
        (lambda document: halves(document, (0, 3), (3, 5)), "holds 20 of its 24"),
        (lambda document: halves(document, (0, 3), (2, 5)), "overlap"),
        (lambda document: halves(document, (0, 3), (0, 3)), "overlap"),
        (lambda document: halves(document, (0, 3), (4, 7)), "outside its shape"),
        (lambda document: halves(document, (0, 8), (8, 6)), "outside its shape"),
        (lambda document: a_chunks(document)[0].update(file="9.safetensors"), "which the manifest does not list"),
        (lambda document: a_chunks(document)[0].update(size=[6]), "tensors.model.a.weight is damaged"),
        (
            lambda document: document["tensors"]["model.scale"]["chunks"].append(
                {"offset": [], "size": [], "file": SHARD}
            ),
            "2 of its 1",
        ),
        (lambda document: document.pop("tensors"), "tensors is None"),
        (lambda document: document.update(files=[]), r"files is \[\]"),
        (
            lambda document: document["files"].update({"../30.safetensors": {"size": 1, "xxh3": ""}}),
            "not a plain file name",
        ),
    ],
)
def test_a_manifest_that_does_not_add_up_is_refused_whatever_its_checksum_says(store, change, message):
    folder = store.folder / "step_00000030"
    reseal(folder, change)
    with pytest.raises(CheckpointError, match=re.compile(message)):
        verify(folder)
    assert store.newest_valid()[0].name == "step_00000020"


def test_chunks_that_fill_a_tensor_exactly_once_are_accepted_in_any_order(store):
    manifest = json.loads((store.folder / "step_00000030" / MANIFEST).read_text())
    for first, second in (((0, 3), (3, 6)), ((5, 6), (0, 5)), ((0, 0), (0, 6))):
        halves(manifest, first, second)
        check_coverage(store.folder, Manifest.from_json(manifest))
    columns = [([0, 2], [6, 2]), ([0, 0], [6, 2])]
    a_chunks(manifest)[:] = [{"offset": o, "size": s, "file": SHARD} for o, s in columns]
    check_coverage(store.folder, Manifest.from_json(manifest))


def test_columns_that_overlap_are_found_too(store):
    manifest = json.loads((store.folder / "step_00000030" / MANIFEST).read_text())
    boxes = [([0, 0], [6, 2]), ([0, 1], [6, 1]), ([0, 3], [6, 1])]
    a_chunks(manifest)[:] = [{"offset": o, "size": s, "file": SHARD} for o, s in boxes]
    with pytest.raises(CheckpointError, match="overlap"):
        check_coverage(store.folder, Manifest.from_json(manifest))


def test_no_new_start_when_every_checkpoint_is_damaged(store):
    for folder in store.folder.iterdir():
        flip(folder)
    with pytest.raises(CheckpointError, match="all 3 checkpoints") as caught:
        store.newest_valid()
    assert all(name in str(caught.value) for name in names(store)) and "checkpoint.resume=never" in str(caught.value)


def test_a_manifest_is_standard_json_or_is_not_written(store):
    """NaN is no JSON: such a save fails and leaves no checkpoint."""
    with pytest.raises(RuntimeError, match="could not be written") as caught:
        store.save(state(40), at(40, early_stop=EarlyStop(float("nan"))))
    assert "JSON compliant" in str(caught.value.__cause__)
    assert reopen(store.folder).newest_valid()[0].name == "step_00000030"


def test_a_run_without_checkpoints_starts_anew(tmp_path):
    assert reopen(tmp_path / "none").newest_valid() is None


def test_a_save_that_was_cut_short_is_no_checkpoint_and_is_cleared_away(store):
    shutil.copytree(store.folder / "step_00000030", store.folder / "step_00000040.writing")
    again = reopen(store.folder)
    assert again.newest_valid()[0].name == "step_00000030"
    assert names(again) == ["step_00000010", "step_00000020", "step_00000030"]


def test_a_save_of_the_same_step_cut_short_between_its_renames_keeps_the_older_one(store, monkeypatch):
    """Both lie under temporary names then; the next start gives the older its name back."""
    import megatrain.checkpoint.store as module

    real = module.os.replace  # type: ignore[attr-defined]

    def killed(source, target):
        if Path(source).name == "step_00000030.writing":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", killed)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            store.save(state(31), at(30))
    assert not (store.folder / "step_00000030").exists()
    folder, manifest = reopen(store.folder).newest_valid()
    assert torch.equal(load_weights(folder, manifest)["a.weight"], state(30)["model.a.weight"])
    assert names(store) == ["step_00000010", "step_00000020", "step_00000030"]


def test_a_pickle_named_as_a_shard_is_never_executed(store, tmp_path):
    mark = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return Path.touch, (mark,)

    folder = store.folder / "step_00000030"
    (folder / SHARD).write_bytes(pickle.dumps(Attack()))
    (folder / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=SHARD):
        verify(folder)
    seal = {"size": (folder / SHARD).stat().st_size, "xxh3": file_hash(folder / SHARD)}
    reseal(folder, lambda document: document["files"].update({SHARD: seal}))
    manifest = verify(folder)
    with pytest.raises(CheckpointError, match=rf"{SHARD} cannot be read") as caught:
        load_into(folder, manifest, {"model.a.weight": torch.zeros(6, 4)}, None)
    assert "\n" not in str(caught.value), "one clear line, no stack trace"
    assert not mark.exists()
    pickle.loads((folder / SHARD).read_bytes())
    assert mark.exists(), "the attack itself works"


def test_loading_another_shape_or_a_missing_tensor_is_refused_by_name(store):
    folder = store.folder / "step_00000030"
    with pytest.raises(CheckpointError, match=r"model\.a\.weight has shape \(6, 4\), this model's has \(4, 6\)"):
        load_into(folder, verify(folder), {"model.a.weight": torch.zeros(4, 6)}, None)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*model\.c"):
        load_into(folder, verify(folder), {"model.c": torch.zeros(4)}, None)


# ---------------------------------------------------------------------------------------------------- retiring


def test_the_newest_are_kept_and_milestones_stay(store):
    for step in (40, 50, 60):
        store.save(state(step), at(step))
    store.retire(2, 30)
    assert names(store) == ["step_00000030", "step_00000050", "step_00000060"]


def test_keep_zero_retires_nothing(store):
    store.save(state(40), at(40))
    store.damaged.add(store.folder / "step_00000010")
    store.retire(0, 0)
    assert len(names(store)) == 4


def test_damaged_checkpoints_of_later_steps_do_not_push_out_the_whole_ones(store):
    """Resumed from step 10 because 20 and 30 are damaged, a save at 15 is the newest valid: it must stay."""
    flip(store.folder / "step_00000020")
    flip(store.folder / "step_00000030")
    assert store.newest_valid()[0].name == "step_00000010"
    store.save(state(15), at(15))
    store.retire(1, 0)
    assert reopen(store.folder).newest_valid()[0].name == "step_00000015"
    store.retire(2, 0)
    assert "step_00000015" in names(store)


def test_a_checkpoint_found_damaged_does_not_count_among_those_kept(store):
    flip(store.folder / "step_00000030")
    store.newest_valid()
    store.save(state(40), at(40))
    store.retire(2, 0)
    assert {"step_00000040", "step_00000020"} <= set(names(store)) and "step_00000010" not in names(store)


def test_checkpoints_of_later_steps_do_not_push_out_those_of_a_run_taken_up_earlier(store):
    """Continued from step 10 by request while 20 and 30 are whole: the save at 15 is what the new way has."""
    store.save(state(15), at(15))
    store.retire(1, 0)
    assert "step_00000015" in names(store) and "step_00000010" not in names(store)


def test_saving_a_step_again_replaces_a_damaged_one(store):
    flip(store.folder / "step_00000030")
    store.newest_valid()
    store.save(state(31), at(30))
    assert torch.equal(load_weights(*reopen(store.folder).newest_valid())["a.weight"], state(31)["model.a.weight"])
    assert names(store) == ["step_00000010", "step_00000020", "step_00000030"]
    store.retire(1, 0)
    assert names(store) == ["step_00000030"]


def test_a_full_disk_ends_a_save_with_one_message_and_spares_what_was_saved(store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatrain.checkpoint.storage.write_safetensors", full)
    with pytest.raises(EnvironmentFault, match=r"step_00000040.writing cannot be written: .*No space left on device"):
        store.save(state(40), at(40))
    monkeypatch.undo()
    assert reopen(store.folder).newest_valid()[0].name == "step_00000030"


def test_a_disk_that_refuses_to_retire_ends_nothing(store, monkeypatch):
    """What could not be removed stays whole, and goes after the next save."""

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("megatrain.checkpoint.store.os.replace", refuse)
        store.retire(1, 0)
    assert len(names(store)) == 3 and all(verify(store.folder / name) for name in names(store))
    store.retire(1, 0)
    assert names(store) == ["step_00000030"]


@pytest.mark.parametrize("kind", ["a file", "a link to nowhere"])
def test_what_is_in_the_place_of_the_checkpoints_is_named(tmp_path, kind):
    place = tmp_path / "checkpoints"
    place.touch() if kind == "a file" else place.symlink_to("nowhere")
    with pytest.raises(ConfigError, match=f"run.dir: .*checkpoints is {kind}, but"):
        CheckpointStore(place, World(0, 1, 0, torch.device("cpu"), None))

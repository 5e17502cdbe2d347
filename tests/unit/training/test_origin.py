"""Which checkpoint a run starts from: its own, one of its own gone back to, one of another run, or weights alone."""

import logging
from typing import Any

import pytest
import torch
from support.records import at

from megatrain.checkpoint.manifest import Identity, Manifest
from megatrain.checkpoint.store import CheckpointStore
from megatrain.config import TrainConfig
from megatrain.data.tokenizer import META
from megatrain.distributed.world import World
from megatrain.errors import CheckpointError, ConfigError, OwnedError
from megatrain.training.origin import Origin, choose_origin, inherited_generation


def store_of(run_dir):
    """The store of a run that starts; `told` collects its events."""
    told = []
    store: Any = CheckpointStore(
        run_dir / "checkpoints",
        World(0, 1, 0, torch.device("cpu"), None),
        lambda kind, **detail: told.append((kind, detail)),
    )
    store.told = told
    return store


def save(store, *steps, **identity):
    for step in steps:
        store.save({"model.w": torch.full((2,), float(step))}, at(step, identity=Identity(**identity)))


def asking(**checkpoint):
    config = TrainConfig()
    for name, value in checkpoint.items():
        setattr(config.checkpoint, name, str(value))
    return config


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_lies_beyond_a_checkpoint_gone_back_to_is_set_aside_and_never_taken_up_again(tmp_path):
    """Back to 5 of 20 and killed: the plain command continues from 5, not from the abandoned 20, which is kept."""
    store = store_of(tmp_path)
    save(store, 5, 10, 20)
    origin = choose_origin(asking(resume=store.folder / "step_00000005"), store)
    assert origin.resumes and origin.manifest.step == 5
    assert names(store.folder) == ["step_00000005", "step_00000010", "step_00000020"], "choosing alone moves nothing"
    store.set_aside(5)
    assert choose_origin(asking(), store_of(tmp_path)).manifest.step == 5
    assert names(store.folder) == ["abandoned-1", "step_00000005"]
    assert names(store.folder / "abandoned-1") == ["step_00000010", "step_00000020"]
    assert [kind for kind, _ in store.told] == ["set_aside"]
    save(store, 10)
    store.set_aside(5)
    store.set_aside(5)
    assert names(store.folder) == ["abandoned-1", "abandoned-2", "step_00000005"]


def test_a_run_taken_over_meanwhile_sets_nothing_aside_and_retires_nothing(tmp_path):
    """It slept, and what lies there is the new owner's."""
    store = store_of(tmp_path)
    save(store, 5, 10, 20)

    def refuse():
        raise OwnedError("another job's")

    store.may_write = refuse
    for write in (lambda: store.set_aside(5), lambda: store.retire(1, 0)):
        with pytest.raises(OwnedError):
            write()
    assert names(store.folder) == ["step_00000005", "step_00000010", "step_00000020"]


def test_a_job_that_goes_back_does_so_once_however_often_it_is_started_again(tmp_path):
    """Back to 5 of 10, on to 20 and killed: it continues from 20. The command given anew goes back anew."""
    store = store_of(tmp_path)
    save(store, 5, 10, origin=None)
    config = asking(resume=store.folder / "step_00000005")
    first = choose_origin(config, store)
    killed_before_it_began = choose_origin(config, store, restarted=True)
    assert killed_before_it_began.manifest.step == 5
    store.set_aside(5)
    save(store, 20, origin=first.began_from)
    assert choose_origin(config, store, restarted=True).manifest.step == 20
    assert choose_origin(config, store).manifest.step == 5


def test_a_run_begun_from_another_runs_checkpoint_goes_on_with_its_own(tmp_path):
    """The same command repeated continues the newest of its own; so does the plain one, which keeps the path."""
    elsewhere = store_of(tmp_path / "a")
    save(elsewhere, 5)
    config = asking(resume=elsewhere.folder / "step_00000005")
    store = store_of(tmp_path / "b")
    first = choose_origin(config, store)
    assert (first.folder, first.resumes) == (elsewhere.folder / "step_00000005", True)
    save(store, 7, origin=first.began_from)
    again = choose_origin(config, store)
    assert (again.folder, again.began_from) == (store.folder / "step_00000007", first.began_from)
    assert choose_origin(asking(), store).began_from == first.began_from


def test_another_runs_checkpoint_is_refused_over_ones_that_do_not_come_from_it(tmp_path):
    """Neither history is the one asked for: another run.name is."""
    elsewhere, store = store_of(tmp_path / "a"), store_of(tmp_path / "b")
    save(elsewhere, 5)
    save(store, 7, origin=None)
    with pytest.raises(ConfigError, match=r"belongs to another run.*run\.name"):
        choose_origin(asking(resume=elsewhere.folder / "step_00000005"), store)
    with pytest.raises(ConfigError, match=r"run\.name"):
        choose_origin(asking(resume=tmp_path / "a"), store)


@pytest.mark.parametrize("key", ["init_from", "resume"])
def test_of_a_run_folder_the_newest_that_is_whole_is_taken_with_a_warning(key, tmp_path, caplog):
    """A damaged newest checkpoint is skipped and named."""
    elsewhere = store_of(tmp_path / "a")
    save(elsewhere, 5, 10)
    (elsewhere.folder / "step_00000010" / "0.safetensors").write_bytes(b"short")
    with caplog.at_level(logging.WARNING, "megatrain"):
        origin = choose_origin(asking(**{key: tmp_path / "a"}), store_of(tmp_path / "b"))
    assert origin.folder.name == "step_00000005" and origin.resumes == (key == "resume")
    assert "skipping the damaged checkpoint" in caplog.text and "step_00000010" in caplog.text


def test_a_checkpoint_asked_for_by_name_is_never_replaced_by_another(tmp_path):
    """Damaged, it is refused, though an older whole one lies beside it."""
    elsewhere = store_of(tmp_path / "a")
    save(elsewhere, 5, 10)
    (elsewhere.folder / "step_00000010" / "0.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="step_00000010"):
        choose_origin(asking(init_from=elsewhere.folder / "step_00000010"), store_of(tmp_path / "b"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        choose_origin(asking(init_from=tmp_path / "empty"), store_of(tmp_path / "b"))


@pytest.mark.parametrize(
    ("has_tokenizer", "override", "keeps"), [(True, [], True), (True, ["tokenizer"], False), (False, [], False)]
)
def test_a_new_run_takes_over_token_ids_only_if_the_tokenizer_is_known_to_be_the_same(
    tmp_path, has_tokenizer, override, keeps
):
    if has_tokenizer:
        (tmp_path / "tokenizer").mkdir()
        (tmp_path / "tokenizer" / META).write_text("{}")
    manifest = Manifest(identity=Identity(generation={"temperature": 0.6, "eos_token_id": 7}))
    found = inherited_generation(Origin(tmp_path, manifest, resumes=False), override)
    assert found == ({"temperature": 0.6, "eos_token_id": 7} if keeps else {"temperature": 0.6})
    assert inherited_generation(Origin(tmp_path, manifest, resumes=True), override) == manifest.identity.generation

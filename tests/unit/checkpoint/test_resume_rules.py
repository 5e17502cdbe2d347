"""Which keys a resume may change."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from megatrain.checkpoint.manifest import Identity
from megatrain.checkpoint.resume import MAY_CHANGE, changed_keys, check_resume, may_change
from megatrain.config import TrainConfig, walk
from megatrain.config.flatten import flatten
from megatrain.errors import CheckpointError, DataError


def identity(config):
    return Identity(asdict(config), "abc")


def test_layout_and_housekeeping_may_change():
    """Engine, stage, ranks, precision, saving and tracking do not change what is trained; they are named."""
    config = TrainConfig()
    old = identity(config)
    config.engine.name, config.parallel.zero, config.launch.nproc_per_node = "native", 0, 4
    config.train.steps, config.checkpoint.every, config.train.micro_batch_size = 7, 1, 1
    changed = check_resume(old, asdict(config), "abc", "step_1")
    assert set(changed) == {
        "engine.name", "parallel.zero", "launch.nproc_per_node", "train.steps", "checkpoint.every",
        "train.micro_batch_size",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("model", "num_layers", 9), ("model", "dropout", 0.5), ("optim", "lr", 1.0), ("optim", "betas", [0.5, 0.5]),
        ("optim", "schedule", "linear"), ("train", "global_batch_size", 64), ("train", "seq_len", 64),
        ("data", "name", "other"),
    ],
)  # fmt: skip
def test_what_is_trained_may_not_change(group, name, value):
    """Another model, update, schedule or order is refused by key, with both values and the way to a new run."""
    config = TrainConfig()
    old = identity(config)
    setattr(getattr(config, group), name, value)
    with pytest.raises(CheckpointError) as caught:
        check_resume(old, asdict(config), "abc", "step_1")
    assert f"{group}.{name} was " in str(caught.value) and repr(value) in str(caught.value)
    assert "checkpoint.init_from=step_1" in str(caught.value)


def test_another_dataset_is_refused():
    """The fingerprint decides, not the name."""
    with pytest.raises(DataError, match="was abc and is now xyz"):
        check_resume(identity(TrainConfig()), asdict(TrainConfig()), "xyz", "step_1")


def test_the_list_names_only_keys_that_exist():
    """Every pattern matches some key of the schema, and the seed matches none."""
    keys = set(flatten(asdict(TrainConfig()))) | set(walk(TrainConfig))
    for pattern in MAY_CHANGE:
        stem = pattern.rstrip("*")
        assert any(key == pattern or key.startswith(stem) for key in keys), pattern
    assert not may_change("seed") and not may_change("model.vocab_size")


def test_changed_keys_sees_added_and_lost_keys():
    """A key that only one config has counts as changed."""
    assert changed_keys({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == {"a.c": (None, 2)}


def test_weights_alone_cannot_be_continued_and_say_so():
    """One sentence that points to checkpoint.init_from, not a list of every key that a run would have."""
    imported = Identity({"model": asdict(TrainConfig().model)}, imported_from="hf")
    with pytest.raises(CheckpointError, match=r"only weights.*checkpoint\.init_from=imported") as caught:
        check_resume(imported, asdict(TrainConfig()), "abc", "imported")
    assert "optim.lr" not in str(caught.value)


def test_a_key_younger_than_the_manifest_had_its_default():
    """An older version's run continues, unless the new key is now set to something else."""
    config = TrainConfig()
    old = identity(config)
    del old.config["model"]["qk_norm"], old.config["optim"]["betas"]
    assert check_resume(old, asdict(config), "abc", "step_1") == {}
    config.model.qk_norm = True
    with pytest.raises(CheckpointError, match=r"model\.qk_norm was False and is now True"):
        check_resume(old, asdict(config), "abc", "step_1")

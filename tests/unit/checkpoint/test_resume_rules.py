"""Which keys a resume may change."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from megatrain.checkpoint.manifest import EngineCounters, Identity, Manifest, OptimizerState, Override, Progress
from megatrain.checkpoint.resume import MAY_CHANGE, OVERRIDES, changed_keys, check_resume, may_change, take_over
from megatrain.config import TrainConfig, walk
from megatrain.config.flatten import flatten
from megatrain.config.plain import plain
from megatrain.errors import CheckpointError, DataError


def saved(config):
    return Manifest(identity=Identity(asdict(config), "abc"))


def test_layout_and_housekeeping_may_change():
    """Engine, stage, ranks, precision, saving and tracking do not change what is trained; they are named."""
    config = TrainConfig()
    old = saved(config)
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
        ("model", "norm", "layernorm"),
    ],
)  # fmt: skip
def test_what_is_trained_may_not_change(group, name, value):
    """Another model, update, schedule or order is refused by key, with both values and the way to a new run."""
    config = TrainConfig()
    old = saved(config)
    setattr(getattr(config, group), name, value)
    with pytest.raises(CheckpointError) as caught:
        check_resume(old, asdict(config), "abc", "step_1")
    assert f"{group}.{name} was " in str(caught.value) and f"is now {plain(value)}" in str(caught.value)
    assert "start anew under another run.name" in str(caught.value)
    assert ("checkpoint.init_from=step_1" in str(caught.value)) == (group != "model"), "its weights may not fit"
    advised = f"'checkpoint.override=[{group}.{name}]'" in str(caught.value)
    assert advised == (f"{group}.{name}" in OVERRIDES), "advice names only what would work"


def test_a_label_and_another_spelling_of_the_same_sizes_change_nothing():
    """The dataset's fingerprint decides, not its name; a size of null is the number that it stands for."""
    config = TrainConfig()
    old = saved(config)
    config.model.name, config.data.name = "mine", "renamed"
    config.model.num_kv_heads, config.model.ffn_size = config.model.num_heads, 4 * config.model.hidden_size
    config.model.head_size = config.model.hidden_size // config.model.num_heads
    assert set(check_resume(old, asdict(config), "abc", "step_1")) == {"model.name", "data.name"}
    config.model.ffn_size += 1
    with pytest.raises(CheckpointError, match=r"model\.ffn_size was null and is now 257"):
        check_resume(old, asdict(config), "abc", "step_1")


def aged(step=0, cursor=0, ranges=(), given=()):
    """A manifest after `step` updates that skips `ranges`, of which the config gave some, and the config to resume."""
    asked = TrainConfig()
    progress = Progress(step, cursor, skip_ranges=list(ranges))
    asked.train.skip_ranges = [list(pair) for pair in given]
    counters = EngineCounters(OptimizerState("adamw", step))
    return Manifest(progress, counters, Identity(asdict(asked), "abc")), asked


def test_an_override_lets_a_key_change_keeps_the_place_and_is_recorded():
    """Only the named keys: the others are refused as before. Earlier overrides stay in the record."""
    old, config = aged(step=60, cursor=480)
    config.optim.lr, config.optim.grad_clip, config.train.global_batch_size = 1e-5, 0.5, 16
    config.checkpoint.override = ["optim.lr", "optim.grad_clip"]
    with pytest.raises(CheckpointError, match=r"train\.global_batch_size was 8 and is now 16") as caught:
        check_resume(old, asdict(config), "abc", "step_60")
    assert "optim.lr" not in str(caught.value)
    config.checkpoint.override.append("train.global_batch_size")
    changed = check_resume(old, asdict(config), "abc", "step_60")
    progress, overrides = take_over(old, changed)
    assert progress == old.progress
    assert Override(60, "optim.lr", 3e-4, 1e-5) in overrides and len(overrides) == 3
    later = Manifest(Progress(70), old.counters, Identity(asdict(config), "abc", overrides=overrides))
    config.optim.lr = 2e-5
    _, overrides = take_over(later, check_resume(later, asdict(config), "abc", "step_70"))
    assert [one.step for one in overrides] == [60, 60, 60, 70]


def test_a_name_in_override_does_not_make_another_model_or_order_possible():
    old, config = aged(step=5)
    config.train.seq_len, config.checkpoint.override = 64, ["train.seq_len"]
    with pytest.raises(CheckpointError, match=r"train\.seq_len was 256 and is now 64"):
        check_resume(old, asdict(config), "abc", "step_5")


def test_betas_change_once_the_moments_are_old_enough():
    """Adam divides by 1 - beta^step: a beta of 0.999 at step 100 would make the steps three times too long."""
    for step, is_honoured in ((0, True), (100, False), (4602, False), (4603, True)):
        old, config = aged(step)
        config.optim.betas, config.checkpoint.override = [0.9, 0.999], ["optim.betas"]
        if is_honoured:
            assert "optim.betas" in check_resume(old, asdict(config), "abc", "step")
        else:
            with pytest.raises(CheckpointError, match=r"keep \[0.9, 0.95\] until step 4603"):
                check_resume(old, asdict(config), "abc", "step")


def test_skip_ranges_change_ahead_of_the_run_only():
    """What the loss guard skips stays skipped; samples that were read or skipped already are history."""
    old, config = aged(step=4, cursor=100, ranges=[(10, 20), (90, 150), (300, 310)], given=[(10, 20), (300, 310)])
    config.checkpoint.override = ["train.skip_ranges"]
    config.train.skip_ranges = [[10, 20], [200, 220]]
    progress, _ = take_over(old, check_resume(old, asdict(config), "abc", "step_4"))
    assert progress.skip_ranges == [(10, 20), (90, 150), (200, 220)]
    for ranges in ([[10, 30], [300, 310]], [[300, 310]], [[10, 20], [96, 110], [300, 310]]):
        config.train.skip_ranges = ranges
        with pytest.raises(CheckpointError, match="change only those from sample 100 on"):
            check_resume(old, asdict(config), "abc", "step_4")


def test_a_run_is_not_continued_in_place_of_a_start_from_other_weights(tmp_path):
    """The run has checkpoints, and the command names weights that it did not begin from."""
    old, config = aged(step=5)
    config.checkpoint.init_from = str(tmp_path / "imported")
    with pytest.raises(CheckpointError, match=r"began from no other weights; give another run\.name"):
        check_resume(old, asdict(config), "abc", "step_5")
    old.identity.config["checkpoint"]["init_from"] = str(tmp_path / "x" / ".." / "imported")
    assert "checkpoint.init_from" in check_resume(old, asdict(config), "abc", "step_5")


def test_another_dataset_is_refused():
    """The fingerprint decides, not the name."""
    with pytest.raises(DataError, match=r"was abc and is now xyz; .* with checkpoint\.init_from=step_1$"):
        check_resume(saved(TrainConfig()), asdict(TrainConfig()), "xyz", "step_1")


def test_a_new_run_from_weights_is_offered_only_if_they_fit():
    """Another tokenizer makes them worthless."""
    config = TrainConfig()
    with pytest.raises(DataError, match=r"or start a new run with run\.name=<new name>$"):
        check_resume(saved(config), asdict(config), "xyz", "step_1", lambda: False)
    old = saved(config)
    config.train.seq_len += 1
    with pytest.raises(CheckpointError, match=r"or start anew under another run\.name$"):
        check_resume(old, asdict(config), "abc", "step_1", lambda: False)


def test_the_list_names_only_keys_that_exist():
    """Every pattern matches some key of the schema, and the seed matches none. A key is on one list only."""
    keys = set(flatten(asdict(TrainConfig()))) | set(walk(TrainConfig))
    for pattern in MAY_CHANGE:
        stem = pattern.rstrip("*")
        assert any(key == pattern or key.startswith(stem) for key in keys), pattern
    assert set(OVERRIDES) <= keys and not any(map(may_change, OVERRIDES))
    assert not may_change("seed") and not may_change("model.vocab_size")


def test_changed_keys_sees_added_and_lost_keys():
    """A key that only one config has counts as changed."""
    assert changed_keys({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == {"a.c": (None, 2)}


def test_weights_alone_cannot_be_continued_and_say_so():
    """One sentence that points to checkpoint.init_from, not a list of every key that a run would have."""
    imported = Manifest(identity=Identity({"model": asdict(TrainConfig().model)}, imported_from="hf"))
    with pytest.raises(CheckpointError, match=r"only weights.*checkpoint\.init_from=imported") as caught:
        check_resume(imported, asdict(TrainConfig()), "abc", "imported")
    assert "optim.lr" not in str(caught.value)


def test_a_key_younger_than_the_manifest_had_its_default():
    """An older version's run continues, unless the new key is now set to something else."""
    config = TrainConfig()
    old = saved(config)
    del old.identity.config["model"]["qk_norm"], old.identity.config["optim"]["betas"]
    assert check_resume(old, asdict(config), "abc", "step_1") == {}
    config.model.qk_norm = True
    with pytest.raises(CheckpointError, match=r"model\.qk_norm was false and is now true"):
        check_resume(old, asdict(config), "abc", "step_1")

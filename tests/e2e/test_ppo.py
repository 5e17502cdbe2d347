"""`megatrain tune method=ppo`: a value head beside the model, resumed with it in the middle of a rollout."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.commands import megatrain, metrics, same
from support.rollouts import write_base_and_prompts

from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.store import load_into
from megatrain.interop.load_model import load

TUNE = [
    "tune", "base", "method=ppo", "data.paths=[questions.jsonl]", "method.rewards=[own.py:vowels]", "train.steps=6",
    "train.global_batch_size=16", "train.micro_batch_size=4", "method.max_new_tokens=8", "train.seq_len=64",
    "method.updates=3", "method.kl=0.02", "optim.lr=1e-2", "engine=native", "tracking=none", "checkpoint.every=1",
    "checkpoint.keep=10",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a random model and the run `base-ppo`."""
    folder = tmp_path_factory.mktemp("ppo")
    write_base_and_prompts(folder)
    done = megatrain(folder, *TUNE)
    assert done.returncode == 0, done.stderr
    assert "drawn anew: value.weight" in done.stderr
    return folder


def everything(folder, name):
    """Return all tensors of a run's last checkpoint."""
    last = folder / "runs" / name / "checkpoints" / "step_00000006"
    manifest = read_manifest(last)
    state = {key: torch.empty(entry.shape) for key, entry in manifest.tensors.items()}
    load_into(last, manifest, state, None)
    return state


def test_a_run_resumed_in_the_middle_of_a_rollout_ends_bit_for_bit_the_same(place):
    shutil.copytree(place / "runs" / "base-ppo", place / "runs" / "again")
    for step in (5, 6):
        shutil.rmtree(place / "runs" / "again" / "checkpoints" / f"step_{step:08d}")
    held = read_manifest(place / "runs" / "again" / "checkpoints" / "step_00000004").tensors
    assert {"buffer.rollout.values", "buffer.rollout.returns", "critic.weight"} <= held.keys()
    done = megatrain(place, *TUNE, "run.name=again")
    assert done.returncode == 0, done.stderr
    same(metrics(place, "again"), metrics(place, "base-ppo"))
    own, expected = everything(place, "again"), everything(place, "base-ppo")
    assert own.keys() == expected.keys() and own["critic.weight"].any()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())


def test_values_are_learnt_and_what_is_rewarded_becomes_likelier(place):
    records = metrics(place, "base-ppo")
    first, second = records[0], records[3]
    assert second["reward"] > first["reward"] and first["kl"] < 1e-6 < second["kl"]
    assert first["value"] == first["explained_variance"] == 0 < second["value"]
    assert first["log_prob_difference"] < 1e-5 < records[1]["log_prob_difference"]
    assert "groups_without_signal" not in first and "value_loss" in records[1]


def test_others_take_the_model_without_its_value_head(place):
    model = load(place / "runs" / "base-ppo").build(torch.device("cpu"))
    assert model.value is None and model(torch.tensor([[1, 2]])).shape[-1] == model.config.vocab_size

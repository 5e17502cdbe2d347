"""`megatrain tune method=grpo`: rollouts between steps, resumed in their middle bit for bit, in another layout too."""

from __future__ import annotations

import shutil

import pytest
import torch
from support.commands import megatrain, metrics, same
from support.reward_models import write_reward_model
from support.rollouts import write_base_and_prompts

from megatrain.checkpoint.lineage import find_line
from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.store import load_weights
from megatrain.config import EvaluateConfig
from megatrain.errors import ConfigError
from megatrain.verbs.evaluate import evaluate

TUNE = [
    "tune", "base", "method=grpo", "data.paths=[questions.jsonl]", "train.steps=6",
    "method.rewards=[own.py:vowels,./judge,ends_by_itself]", "method.reward_weights=[1,0.01,0.1]",
    "train.global_batch_size=16", "train.micro_batch_size=4",
    "method.group_size=4", "method.max_new_tokens=8", "train.seq_len=64", "method.updates=3", "method.kl=0.02",
    "optim.lr=1e-2", "engine=native", "tracking=none", "checkpoint.every=1", "checkpoint.keep=10", "train.eval_every=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a random model and the run `base-grpo`."""
    folder = tmp_path_factory.mktemp("grpo")
    write_base_and_prompts(folder)
    write_reward_model(folder / "judge")  # of another tokenizer and template
    done = megatrain(folder, *TUNE)
    assert done.returncode == 0, done.stderr
    return folder


def copied(folder, name, step):
    """Copy the run as it was after a step; return the records that it must reach."""
    shutil.copytree(folder / "runs" / "base-grpo", folder / "runs" / name)
    for path in (folder / "runs" / name / "checkpoints").iterdir():
        if int(path.name[-8:]) > step:
            shutil.rmtree(path)
    return metrics(folder, "base-grpo")


def weights(folder, name):
    last = folder / "runs" / name / "checkpoints" / "step_00000006"
    return load_weights(last, read_manifest(last))


def test_replies_serve_several_steps_and_what_is_rewarded_becomes_likelier(place):
    records = metrics(place, "base-grpo")
    hashes = [record["batch_hash"] for record in records]
    assert len(set(hashes[:3])) == len(set(hashes[3:])) == 1 and hashes[0] != hashes[3]
    assert ["reward" in record for record in records] == [True, False, False, True, False, False]
    first, second = records[0], records[3]
    assert second["reward"] > first["reward"] and first["kl"] < 1e-6 < second["kl"]
    parts = [first[f"reward/{name}"] for name in ("own.py:vowels", "judge", "ends_by_itself")]
    assert first["reward"] == pytest.approx(parts[0] + 0.01 * parts[1] + 0.1 * parts[2]) and abs(parts[1]) > 0.01
    assert first["log_prob_difference"] < 1e-5 < records[1]["log_prob_difference"], (
        "the trainer agrees with the sampler"
    )


def test_greedy_replies_to_heldout_prompts_are_judged_on_evaluation_steps(place):
    records = metrics(place, "base-grpo")
    assert ["heldout_reward" in record for record in records] == [False, False, False, True, False, True]
    names = [one.name for one in find_line(place / "runs" / "base-grpo")]
    assert names == ["base", "judge", "base-grpo"], "the reward model is an ancestor"
    last = records[-1]
    parts = [last[f"heldout_reward/{name}"] for name in ("own.py:vowels", "judge", "ends_by_itself")]
    assert last["heldout_reward"] == pytest.approx(parts[0] + 0.01 * parts[1] + 0.1 * parts[2])
    assert last["heldout_reward_se"] >= 0 and 1 <= last["heldout_reply_tokens"] <= 8


def test_a_run_resumed_in_the_middle_of_a_rollout_ends_bit_for_bit_the_same(place):
    expected = copied(place, "again", step=4)
    done = megatrain(place, *TUNE, "run.name=again")
    assert done.returncode == 0, done.stderr
    same(metrics(place, "again"), expected)
    own = weights(place, "again")
    assert all(torch.equal(own[name], tensor) for name, tensor in weights(place, "base-grpo").items())


def test_another_layout_continues_with_the_same_replies(place):
    expected = copied(place, "split", step=2)
    done = megatrain(place, *TUNE, "run.name=split", "launch.nproc_per_node=2", "parallel.zero=3")
    assert done.returncode == 0, done.stderr
    found = metrics(place, "split")
    assert [r["batch_hash"] for r in found] == [r["batch_hash"] for r in expected]
    assert found[3]["heldout_reward"] == pytest.approx(expected[3]["heldout_reward"], abs=1e-4)
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], abs=1e-5)


def test_prompts_without_replies_have_no_loss(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match="questions-base holds prompts without replies"):
        evaluate(EvaluateConfig(path="runs/base-grpo", device="cpu"))


def test_a_resume_with_another_reward_model_is_refused(place):
    copied(place, "judged", step=3)
    (place / "judge").rename(place / "kept")
    write_reward_model(place / "judge", seed=8)
    done = megatrain(place, *TUNE, "run.name=judged")
    shutil.rmtree(place / "judge")
    (place / "kept").rename(place / "judge")
    assert done.returncode == 4 and "judge holds another reward model than when this run began" in done.stderr

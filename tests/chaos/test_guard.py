"""Losses that overflow or spike in a real job.

The oracles are the other engine under the same fault, and a run configured to skip the samples that a rollback skips.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.commands import TRAIN, TWO_NATIVE, events, final_files, megatrain, metrics, same
from support.faults import fault, run_with

from megatrain.config import ResilienceConfig
from megatrain.resilience.guard import LossGuard

SAMPLES = 8
"""A step's, in commands.TRAIN; a rank's micro-batches a step, where there are two data ranks, are two."""


def steps(records, start, stop):
    return [record for record in records if start <= record["step"] <= stop]


def leap(step, times=1):
    """Multiply both ranks' losses by ten at a step, in each of the two micro-batches, the given number of times."""
    return [fault(rank, step, "forward", "multiply", times=2 * times, by=10) for rank in (0, 1)]


def test_a_loss_that_overflows_on_one_rank_updates_nothing_on_any_rank(workplace, undisturbed):
    """The step is recorded as skipped and moves nothing, training continues, and both engines end in the same state."""
    runs = {}
    for name, words in {
        "deepspeed": [],
        "native": ["engine=native", "parallel.pp=2", "parallel.zero=0"],
    }.items():
        culprit = 1  # of the pipeline, the rank that computes the loss
        times = 2 if name == "native" else 1  # the pipeline's rank sees all four micro-batches
        done = run_with(
            workplace,
            [fault(culprit, 7, "forward", "add", times=times, by="inf")],
            *TRAIN, f"run.name=overflow-{name}", "launch.nproc_per_node=2", *words,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        runs[name] = metrics(workplace, f"overflow-{name}")
        assert [record["step"] for record in runs[name] if not record["updated"]] == [7]
        assert runs[name][6]["loss"] is None and runs[name][6]["grad_norm"] is None
        (skip,) = events(workplace, f"overflow-{name}", "skip")
        assert skip["step"] == 7 and skip["reason"] == "non-finite loss"
        assert [r["batch_hash"] for r in runs[name]] == [r["batch_hash"] for r in undisturbed]
    same(runs["deepspeed"][:6], undisturbed[:6])
    assert runs["deepspeed"][7]["loss"] != undisturbed[7]["loss"]
    for mine, other in zip(runs["deepspeed"], runs["native"], strict=True):
        if mine["updated"]:
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4), mine["step"]


def test_a_spike_rolls_back_and_ends_where_the_run_without_its_samples_ends(workplace, undisturbed_native):
    """The records are equal bit for bit from the checkpoint on. The data of the three steps up to the spike is skipped,
    and an event reports it.

    A rank is killed during the first rollback: the job resumes from a later checkpoint, which has the loss window,
    meets the spike again and makes the same decision.
    """
    guarded = ["resilience.spike_window=16", "resilience.spike_skip_steps=3"]
    faults = [*leap(37, times=2), fault(1, 37, "load", "SIGKILL")]
    done = run_with(workplace, faults, *TWO_NATIVE, "run.name=spike", *guarded)
    assert done.returncode == 0, done.stderr
    skipped = [34 * SAMPLES, 37 * SAMPLES]
    by_hand = [f"train.skip_ranges=[{json.dumps(skipped)}]", "run.name=by-hand"]
    expected = megatrain(workplace, *TWO_NATIVE, *by_hand, *guarded)
    assert expected.returncode == 0, expected.stderr
    same(metrics(workplace, "spike"), metrics(workplace, "by-hand"))
    same(metrics(workplace, "spike")[:34], undisturbed_native[:34])
    assert metrics(workplace, "spike")[34]["batch_hash"] == metrics(workplace, "by-hand")[34]["batch_hash"]
    assert metrics(workplace, "spike")[34]["batch_hash"] != undisturbed_native[34]["batch_hash"]
    assert final_files(workplace, "spike") == final_files(workplace, "by-hand")
    assert [event["step"] for event in events(workplace, "spike", "resume")] == [35]
    spike, same_spike = events(workplace, "spike", "spike")
    assert {**spike, "time": ""} == {**same_spike, "time": ""}
    (rollback,) = events(workplace, "spike", "rollback")
    assert spike["step"] == 37 and spike["loss"] == pytest.approx(10 * undisturbed_native[36]["loss"], rel=1e-5)
    assert spike["zscore"] > 12 and spike["median"] == np.median([r["loss"] for r in undisturbed_native[20:36]])
    assert (rollback["from_step"], rollback["to_step"], rollback["skip_range"]) == (37, 30, skipped)
    assert rollback["checkpoint"].endswith("step_00000030") and len(set(rollback["windows"])) == 3 * SAMPLES
    checkpoints = workplace / "runs" / "spike" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["abandoned-1", "step_00000035", "step_00000040"]
    assert [path.name for path in (checkpoints / "abandoned-1").iterdir()] == ["step_00000035"]
    cut = (workplace / rollback["cut_metrics"]).read_text().splitlines()
    assert [json.loads(line)["step"] for line in cut] == list(range(31, 38))
    again = megatrain(workplace, *TWO_NATIVE, "run.name=spike", *guarded, "train.skip_ranges=[[0,8]]", "train.steps=45")
    assert again.returncode == 4 and "train.skip_ranges was [] and is now [[0, 8]]" in again.stderr


def test_a_run_that_spikes_every_time_gives_up(workplace):
    """The exit code is 5 after the allowed number of rollbacks, also after a restart; the report names each spike and
    what was tried."""
    words = [*TWO_NATIVE, "run.name=diverged", "resilience.spike_window=8"]
    words += ["resilience.spike_skip_steps=2", "resilience.max_rollbacks=2"]
    done = run_with(workplace, leap(12, times=99), *words)
    assert done.returncode == 5, done.stderr
    rollbacks = events(workplace, "diverged", "rollback")
    assert [event["to_step"] for event in rollbacks] == [10, 10]
    assert [event["skip_range"] for event in rollbacks] == [[80, 96], [96, 112]]
    assert [event["step"] for event in events(workplace, "diverged", "spike")] == [12] * 3
    assert "samples 80 to 95 skipped); step 12" in done.stderr and "resilience.max_rollbacks=2" in done.stderr
    assert events(workplace, "diverged", "stop")[-1]["status"] == "failed"
    assert [record["step"] for record in metrics(workplace, "diverged")] == list(range(1, 13))
    again = run_with(workplace, leap(12, times=99), *words)
    assert again.returncode == 5 and len(events(workplace, "diverged", "rollback")) == 2, again.stderr


def test_real_losses_raise_no_alarm(undisturbed):
    """The losses of a small run fall fast and vary a lot between steps; the window is the shortest allowed."""
    guard = LossGuard.from_config(ResilienceConfig(spike_window=8))
    losses = [record["loss"] for record in undisturbed]
    assert losses[-1] < losses[0] - 0.5
    assert not any(guard.judge(losses[:step], step + 1, loss) for step, loss in enumerate(losses))

"""Which checkpoint a rollback goes to, which samples it leaves out, and what it does with what came after."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatrain.checkpoint.manifest import EarlyStop, EngineCounters, LossGuardState, OptimizerState, Progress, RunRecord
from megatrain.checkpoint.memory_store import MemoryStore
from megatrain.checkpoint.naming import list_checkpoints
from megatrain.checkpoint.store import CheckpointStore
from megatrain.data.order import SampleOrder, take
from megatrain.distributed.world import World
from megatrain.resilience.guard import Spike
from megatrain.tracking.journal import Journal
from megatrain.training.rollback import CheckpointRollback


class FakeEngine:
    def __init__(self):
        self.weight = torch.zeros(1)

    def state(self):
        return {"model.w": self.weight}

    def restore(self, counters):
        self.optimizer = counters.optimizer


class FakeStream:
    def __init__(self):
        self.restarts = []

    def restart(self, first_step, cursor, skip_ranges):
        self.restarts.append((first_step, cursor, skip_ranges))


def samples(step):
    """A batch ramp: 4, 4, 4, then 8."""
    return 4 if step <= 3 else 8


class Run:
    """A run that has trained to `last` and saved after some steps, its weight being the step."""

    def __init__(self, folder, saved, last, skip_ranges=(), skip_steps=3, best=None):
        self.folder, self.engine, self.stream = folder, FakeEngine(), FakeStream()
        world = World(0, 1, 0, torch.device("cpu"), None)
        self.store = CheckpointStore(folder / "checkpoints", world)
        self.journal = Journal(folder)
        self.now = Progress(skip_ranges=list(skip_ranges), early_stop=EarlyStop(best))
        self.taken = {}
        for step in range(1, last + 1):
            positions, self.now.cursor = take(self.now.cursor, samples(step), skip_ranges)
            self.taken[step] = positions.tolist()
            self.now.step, self.now.loss_guard = step, LossGuardState([2.0] * step)
            self.engine.weight.fill_(step)
            self.journal.step({"step": step})
            if step in saved:
                self.store.save(self.engine.state(), self.record(step))
        self.memory = MemoryStore(folder / "copies", world)
        self.memory.save(self.engine.state(), self.record(last - 1))
        self.order = SampleOrder("fingerprint", "train", 8, 1249, 1)
        self.go_back = CheckpointRollback(
            world, self.engine, self.store, self.memory, self.journal, self.stream, self.order, samples, skip_steps
        )
        self.spike = Spike(last, 9.0, 50.0, 2.0)

    def record(self, step):
        return RunRecord(replace(self.now, step=step), EngineCounters(OptimizerState("adamw", step)))

    def event(self):
        (event,) = [
            event
            for event in map(json.loads, (self.folder / "events.jsonl").read_text().splitlines())
            if event["kind"] == "rollback"
        ]
        return event


@pytest.mark.parametrize(
    ("saved", "to", "left_out"),
    [
        ([2, 4, 6, 8], 6, [7, 8, 9]),  # 8 lies within the steps in doubt
        ([2, 8], 2, [7, 8, 9]),
        ([7, 8], 8, [9]),  # nothing before them: the newest, and no sample from before it
        ([1, 2, 9], 2, [7, 8, 9]),  # the spike's own step is no way out
    ],
)
def test_it_goes_to_the_newest_checkpoint_from_before_the_steps_in_doubt(tmp_path, saved, to, left_out):
    """Engine, stream and progress go back, later checkpoints are set aside, and exactly those samples are skipped."""
    run = Run(tmp_path, saved, 9)
    there = run.go_back(run.now, run.spike)
    expected = [sample for step in left_out for sample in run.taken[step]]
    skip = (expected[0], expected[-1] + 1)
    assert (there.step, there.loss_guard.losses, there.skip_ranges) == (to, [2.0] * to, [skip])
    assert (there.loss_guard.rollbacks[0]["step"], there.loss_guard.rollbacks[0]["skip_range"]) == (9, list(skip))
    assert run.engine.weight.item() == to and run.engine.optimizer.step == to
    assert run.stream.restarts == [(to + 1, run.taken[to][-1] + 1, [skip])]
    assert [int(path.name[-2:]) for path in list_checkpoints(tmp_path / "checkpoints")] == [
        step for step in reversed(saved) if step <= to
    ]
    event = run.event()
    assert (event["from_step"], event["to_step"], event["skip_range"]) == (9, to, list(skip))
    assert event["windows"] == run.order.windows(np.array(expected)).tolist()
    kept = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == list(range(1, to + 1))
    assert run.memory.newest_valid(after=0) is None, "a copy of the abandoned history must not be gone on from"


def test_it_counts_samples_as_the_run_took_them(tmp_path):
    """Over ranges that were passed over already, which stay so and are not told again."""
    ranges = [(6, 10), (36, 39)]
    run = Run(tmp_path, [2, 5], 8, ranges)
    there = run.go_back(run.now, run.spike)
    expected = [sample for step in (6, 7, 8) for sample in run.taken[step]]
    assert expected[0] < 36 and expected[-1] > 39 and 37 not in expected
    assert there.step == 5 and there.skip_ranges == [(6, 10), (expected[0], expected[-1] + 1)]
    assert run.event()["windows"] == run.order.windows(np.array(expected)).tolist()


def test_a_second_rollback_leaves_out_both_ranges(tmp_path):
    """What the first one left out stays out, though the checkpoint does not know of it."""
    run = Run(tmp_path, [5], 9)
    first = run.go_back(run.now, run.spike)
    (taken, cursor) = take(first.cursor, 4 * 8, first.skip_ranges)  # steps 6 to 9 anew
    now = Progress(9, cursor, skip_ranges=first.skip_ranges, loss_guard=first.loss_guard)
    second = run.go_back(now, run.spike)
    assert len(second.loss_guard.rollbacks) == 2 and second.step == 5
    assert second.skip_ranges == [(first.skip_ranges[0][0], cursor)]
    assert taken[0] < first.skip_ranges[0][0], "step 6 is not in doubt and stays"


def test_damaged_checkpoints_are_passed_over(tmp_path):
    """An older whole one is better than a newer damaged one; a newer whole one is better than none."""
    run = Run(tmp_path / "a", [2, 4, 6], 9)
    next((tmp_path / "a" / "checkpoints" / "step_00000006").glob("*.safetensors")).write_bytes(b"")
    assert run.go_back(run.now, run.spike).step == 4
    run = Run(tmp_path / "b", [4, 8], 9)
    next((tmp_path / "b" / "checkpoints" / "step_00000004").glob("*.safetensors")).write_bytes(b"")
    assert run.go_back(run.now, run.spike).step == 8


@pytest.mark.parametrize("saved", [[], [9]])
def test_without_a_checkpoint_before_the_spike_nothing_changes(tmp_path, saved):
    run = Run(tmp_path, saved, 9)
    assert run.go_back(run.now, run.spike) is None
    assert run.engine.weight.item() == 9 and run.stream.restarts == []
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 9
    assert run.memory.newest_valid(after=0) is not None


def test_early_stopping_that_a_resume_began_anew_stays_so(tmp_path):
    """The checkpoint that was resumed from knows the best loss over other sources, the later ones that over these."""
    for saved, to, reset_at, best in (([6], 6, 6, None), ([6], 6, None, 2.5), ([2, 6], 6, 2, 2.5)):
        run = Run(tmp_path / f"{to}_{reset_at}", saved, 9, best=2.5)
        there = replace(run.go_back, reset_at=reset_at)(run.now, run.spike)
        assert (there.step, there.early_stop.best_heldout_loss) == (to, best)


def test_it_never_goes_back_beyond_an_override(tmp_path):
    """Other batch sizes or skip ranges led to older checkpoints: samples would be counted wrongly."""
    for not_before, to in ((6, 6), (7, 8), (9, None)):
        run = Run(tmp_path / str(not_before), [2, 4, 6, 8], 9)
        there = replace(run.go_back, not_before=not_before)(run.now, run.spike)
        assert (there and there.step) == to
    run = Run(tmp_path / "recent", [2, 8], 9)
    there = replace(run.go_back, not_before=8)(run.now, run.spike)
    assert there.step == 8 and there.skip_ranges == [(run.taken[9][0], run.taken[9][-1] + 1)]

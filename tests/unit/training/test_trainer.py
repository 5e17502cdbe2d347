"""The loop, over fakes of the parts it speaks to: when it evaluates, saves, stops and gives up."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatrain.checkpoint.manifest import EarlyStop, EngineCounters, Identity, LossGuardState, OptimizerState, Progress
from megatrain.config import TrainConfig
from megatrain.data.batch import StepBatch
from megatrain.engine.protocol import Measured, SentResult, StepResult
from megatrain.errors import DivergedError, EnvironmentFault, RewardError
from megatrain.training.exchange import RankExchange
from megatrain.training.protocols import Parts, Throughput
from megatrain.training.trainer import Trainer


class FakeEngine:
    """`finite` selects the steps that update, `heldout` holds evaluation losses, `loss` maps a step to its loss."""

    def __init__(self, finite=lambda step: True, heldout=(3.0,), loss=lambda step, count: 2.0, tokens=lambda step: 10):
        self.finite, self.heldout, self.asked, self.trained, self.loss = finite, list(heldout), 0, [], loss
        self.tokens = tokens

    def train_step(self, micro_batches, lr, step):
        self.trained.append((step, lr))
        finite = self.finite(step)
        return StepResult(
            torch.tensor(self.tokens(step) * self.loss(step, len(self.trained))),
            torch.tensor(self.tokens(step)),
            torch.tensor(1.0 if finite else float("nan")),
            torch.tensor(finite),
        )

    def measure(self, batches):
        assert list(batches) == ["batch"]
        self.asked += 1
        return Measured(torch.tensor(self.heldout[min(self.asked, len(self.heldout)) - 1] * 10), torch.tensor(10), {})

    def state(self):
        return {"model.w": torch.zeros(1)}

    def counters(self):
        return EngineCounters(OptimizerState("adamw", len(self.trained)))


class FakeStore:
    """Saves at once; from step `fails_from` on it cannot."""

    def __init__(self, fails_from=None, copies_every=0):
        self.copies_every = copies_every
        self.saved, self.told, self.has_failed, self.fails_from = [], [], False, fails_from
        self.copied, self.busy = [], lambda step: False

    def save(self, state, record):
        step = record.progress.step
        self.saved.append((step, record))
        self.pending = True
        self.has_failed = self.fails_from is not None and step >= self.fails_from
        self.told.append(("save_failed" if self.has_failed else "save", step, {}))
        return 0.5

    def copy(self, state, record):
        self.copied.append(record.progress.step)
        return 0.1

    @property
    def can_copy(self):
        return not self.busy(self.copied[-1] if self.copied else 0)

    def reports(self):
        told, self.told = self.told, []
        return told

    def finish(self):
        self.pending = False
        if self.has_failed:
            raise EnvironmentFault("the disk is full")


class FakeJournal:
    def __init__(self):
        self.records, self.events, self.shown = [], [], []

    def step(self, record):
        self.records.append(record)

    def event(self, kind, step, **detail):
        self.events.append((kind, step, detail))

    def progress(self, step, text):
        self.shown.append((step, text))


class FakeHeldout:
    """One micro-batch of a step's batch, the first of three that there are."""

    source, weight, bytes_per_token = "", 1.0, 4.0
    num_batches, all_batches = 1, 3

    def batches(self):
        return ["batch"]

    def batches_done(self, micro_batches):
        return micro_batches


class FakeClock:
    """The host's clock; `blocked_s` and `event` are replaced where a test needs them."""

    def __init__(self, reads_late=None, blocked_s=lambda: 0.0, event=lambda: None):
        self.reads_late = LATE if reads_late is None else reads_late
        self.blocked_s, self.event = blocked_s, event

    def enter(self, phase, step):
        pass


class FakeStop:
    """A SIGTERM that arrives once so many steps were submitted."""

    def __init__(self, engine, stop_at):
        self.engine, self.stop_at = engine, stop_at

    @property
    def signal_number(self):
        return 15 if self.stop_at is not None and len(self.engine.trained) >= self.stop_at else 0


def alone(all_gather=lambda row: row.unsqueeze(0), readers=(0,)):
    """The exchange of a job of one rank, or of what `all_gather` makes of its row."""
    return RankExchange(all_gather, readers, lambda hashes: str(hashes.shape))


LATE = False
"""Whether results are read late; every test runs both ways."""


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "late"])
def late(request, monkeypatch):
    monkeypatch.setattr(f"{__name__}.LATE", request.param)
    return request.param


def trainer(
    config,
    engine=None,
    progress=None,
    stop_at=None,
    rollback=lambda progress, spike: None,
    copies_every=0,
    on_disk=True,
    reward_fails_at=None,
):
    progress = progress or Progress()

    def stream():
        for step in count(progress.step + 1):
            if step == reward_fails_at:
                raise RewardError("it returned nan")
            ahead = 1 if loop.in_flight.is_idle else 2
            yield StepBatch([], np.arange(8, dtype=np.uint64), 8, progress.cursor + 8 * ahead)

    engine = engine or FakeEngine()
    parts = Parts(
        engine=engine,
        stream=stream(),
        heldout=[FakeHeldout()],
        store=FakeStore(copies_every=copies_every),
        journal=FakeJournal(),
        exchange=alone(),
        clock=FakeClock(),
        stop=FakeStop(engine, stop_at),
        rollback=rollback,
        slow_ranks=lambda step, own_times: None,
        shares=lambda progress: {},
        identity=Identity(),
        throughput=Throughput(3, None),
        state=lambda step: {"step": step},
    )
    loop = Trainer(config, parts, progress, on_disk)
    return loop, parts


def config(**train):
    made = TrainConfig()
    made.train.steps, made.checkpoint.every = 10, 4
    for name, value in train.items():
        setattr(made.train, name, value)
    return made


def test_it_saves_every_so_many_steps_and_at_the_end():
    """Saves at multiples and at the last step; the manifest holds where the run stands."""
    loop, parts = trainer(config())
    assert loop.run() == "done"
    assert [step for step, _ in parts.store.saved] == [4, 8, 10]
    _, record = parts.store.saved[-1]
    progress = record.progress
    assert (progress.cursor, progress.tokens, record.counters.optimizer.step) == (80, 100, 10)
    assert progress.early_stop.best_heldout_loss == 3.0


def test_it_shows_how_far_an_evaluation_is_over_all_sources():
    loop, parts = trainer(config(eval_every=5))
    parts.heldout.append(FakeHeldout())
    loop.run()
    told = ["evaluating 0/2 batches", "evaluating 1/2 batches"]
    assert parts.journal.shown == [(step, text) for step in (5, 10) for text in told]
    (detail, _) = [detail for kind, _, detail in parts.journal.events if kind == "evaluate"]
    assert (detail["num_batches"], detail["all_batches"]) == (2, 6)


def test_it_copies_between_saves_and_never_while_a_save_is_under_way():
    training, parts = trainer(config(steps=20), copies_every=3)
    training.config.checkpoint.every = 8
    training.run()
    assert [step for step, _ in parts.store.saved] == [8, 16, 20]
    assert parts.store.copied == [3, 6, 11, 14, 19], "every third step since the last save or copy"
    training, parts = trainer(config(steps=20), copies_every=3)
    training.config.checkpoint.every = 0
    tries = iter([False] * 4 + [True] * 2 + [False] * 20)
    parts.store.busy = lambda last: next(tries)
    training.run()
    assert parts.store.copied == [3, 7, 10, 13, 16, 19], "the save that was pending at steps 5 and 6 puts the copy off"


def test_a_record_holds_the_mean_loss_and_the_totals():
    """Loss is the sum over the tokens that counted; tokens add up over the run, a resumed one included."""
    loop, parts = trainer(config(), progress=Progress(step=6, cursor=48, tokens=60))
    loop.run()
    assert [record["step"] for record in parts.journal.records] == [7, 8, 9, 10]
    assert parts.journal.records[0]["loss"] == 2.0 and parts.journal.records[-1]["tokens"] == 100
    assert parts.journal.records[-1]["mfu"] is None and parts.journal.records[-1]["batch_hash"] == "(1, 8)"


def test_a_start_from_a_copy_in_memory_has_its_state_on_the_disk_before_it_ends():
    """Stopped at once, or done already: copies in memory are gone with the agent."""
    loop, parts = trainer(config(), progress=Progress(step=6, cursor=48, tokens=60), stop_at=0, on_disk=False)
    assert loop.run() == "stopped" and [step for step, _ in parts.store.saved] == [6]
    stalled = Progress(step=6, cursor=48, tokens=60, early_stop=EarlyStop(None, 2))
    loop, parts = trainer(config(early_stop_patience=2), progress=stalled, on_disk=False)
    assert loop.run() == "done" and [step for step, _ in parts.store.saved] == [6]


def test_a_signal_saves_the_finished_steps_and_stops():
    """The batch that was fetched is not trained on; what is saved is the last finished step, once."""
    loop, parts = trainer(config(), stop_at=6)
    assert loop.run() == "stopped"
    assert [step for step, _ in parts.store.saved] == [4, 6]
    assert parts.store.saved[-1][1].progress.cursor == 48
    assert ("signal", 6, {"signal": 15}) in parts.journal.events


def test_a_reward_that_fails_ends_the_run_with_all_that_was_trained_on_the_disk():
    loop, parts = trainer(config(), reward_fails_at=7)
    with pytest.raises(RewardError):
        loop.run()
    assert [step for step, _ in parts.store.saved] == [4, 6] and not parts.store.pending
    assert [record["step"] for record in parts.journal.records] == [1, 2, 3, 4, 5, 6]


def test_a_signal_right_after_a_save_does_not_save_again():
    """What is on disk already is not written twice."""
    loop, parts = trainer(config(), stop_at=4)
    assert loop.run() == "stopped"
    assert [step for step, _ in parts.store.saved] == [4]


def test_it_evaluates_on_time_and_at_the_end():
    """Held-out loss, perplexity and bits per byte on evaluation steps and the last one only."""
    loop, parts = trainer(config(eval_every=3))
    loop.run()
    assert [record["step"] for record in parts.journal.records if "heldout_loss" in record] == [3, 6, 9, 10]
    detail = next(detail for kind, _, detail in parts.journal.events if kind == "evaluate")
    assert detail["heldout_loss"] == 3.0 and detail["perplexity"] == pytest.approx(np.exp(3.0))
    assert detail["bits_per_byte"] == pytest.approx(3.0 / np.log(2) / 4.0)


def test_early_stopping_waits_for_its_patience():
    """Two evaluations without a gain of at least the delta end the run, saved; a gain starts the count anew."""
    made = config(eval_every=1, early_stop_patience=2, early_stop_min_delta=0.1, steps=50)
    loop, parts = trainer(made, FakeEngine(heldout=[3.0, 2.95, 2.8, 2.75, 2.79]))
    assert loop.run() == "done"
    assert len(parts.journal.records) == 5 and parts.store.saved[-1][0] == 5
    assert parts.journal.events[-2][0] == "early_stop" or parts.journal.events[-1][0] == "early_stop"


def test_only_a_finite_heldout_loss_can_be_the_best():
    """NaN is no improvement and hides no later one: 3.0 after it is the best. The manifest holds only numbers."""
    loop, parts = trainer(config(eval_every=4), FakeEngine(heldout=[float("nan"), 3.0, float("inf")]))
    assert loop.run() == "done"
    states = [record.progress.early_stop for _, record in parts.store.saved]
    assert states == [EarlyStop(None, 1), EarlyStop(3.0, 0), EarlyStop(3.0, 1)]


def test_early_stopping_goes_on_counting_after_a_resume():
    """The count and the best loss come from the checkpoint."""
    made = config(eval_every=1, early_stop_patience=2, steps=50)
    loop, parts = trainer(made, FakeEngine(heldout=[3.0]), Progress(7, 56, 70, [], EarlyStop(2.9, 1)))
    loop.run()
    assert [record["step"] for record in parts.journal.records] == [8]


def test_a_run_that_stopped_early_stays_stopped():
    """Started again with the same command it trains no further step; with more patience it goes on."""
    made = config(eval_every=1, early_stop_patience=2, steps=50)
    loop, parts = trainer(made, FakeEngine(), Progress(9, 72, 90, [], EarlyStop(2.9, 2)))
    assert loop.run() == "done" and parts.journal.records == [] and parts.journal.events == []
    made.train.early_stop_patience, made.train.steps = 3, 10
    loop, parts = trainer(made, FakeEngine(heldout=[3.0]), Progress(9, 72, 90, [], EarlyStop(2.9, 2)))
    loop.run()
    assert [record["step"] for record in parts.journal.records] == [10]


def test_a_vetoed_step_is_recorded_and_consumes_its_samples():
    """The record says `updated: false`, an event names the step, the cursor moves on."""
    loop, parts = trainer(config(), FakeEngine(finite=lambda step: step != 3))
    loop.run()
    assert [record["updated"] for record in parts.journal.records].count(False) == 1
    assert [step for kind, step, _ in parts.journal.events if kind == "skip"] == [3]
    assert parts.store.saved[-1][1].progress.cursor == 80


def test_endless_vetoes_end_the_run():
    """After so many steps without a finite gradient the run is given up with a message that says what to change."""
    made = config(steps=1000)
    made.resilience.max_skipped = 30
    loop, parts = trainer(made, FakeEngine(finite=lambda step: step < 5))
    with pytest.raises(DivergedError, match=r"optim\.lr=0\.0001 'checkpoint\.override=\[optim\.lr\]'"):
        loop.run()
    assert len(parts.journal.records) == 4 + 30 - 1


class FakeRollback:
    """Goes back to step 8, wherever it is asked from."""

    def __init__(self):
        self.spikes, self.store = [], None

    def __call__(self, progress, spike):
        assert self.store is None or not self.store.pending, "what is to be gone back to may still be being written"
        self.spikes.append(spike.step)
        seen = {"step": spike.step, "loss": spike.loss, "zscore": spike.zscore, "skip_range": [72, progress.cursor]}
        guard = LossGuardState([2.0] * 8, [*progress.loss_guard.rollbacks, seen])
        return Progress(8, 64, 80, [(72, progress.cursor)], loss_guard=guard)


def guarded(**train):
    made = config(**train)
    made.resilience.spike_window = 8
    return made


def test_a_spike_takes_the_run_back_and_on():
    """What came after the checkpoint is done again; the skip range is saved at once, the spike's step is not."""
    back = FakeRollback()
    engine = FakeEngine(loss=lambda step, count: 5.0 if count == 12 else 2.0)
    loop, parts = trainer(guarded(steps=20), engine, rollback=back)
    back.store = parts.store
    assert loop.run() == "done"
    assert [record["step"] for record in parts.journal.records] == [*range(1, 13), *range(9, 21)]
    assert back.spikes == [12]
    assert [step for step, _ in parts.store.saved] == [4, 8, 8, 12, 16, 20]
    saved = [record.progress for _, record in parts.store.saved]
    kept = [(progress.skip_ranges, len(progress.loss_guard.rollbacks)) for progress in saved]
    assert kept == [([], 0)] * 2 + [([(72, 96)], 1)] * 2 + [([(72, 96)], 0)] * 2
    (spike,) = [event for event in parts.journal.events if event[0] == "spike"]
    assert spike[1] == 12 and spike[2]["loss"] == 5.0 and spike[2]["median"] == 2.0 and spike[2]["zscore"] > 12


def test_a_run_that_spikes_again_and_again_is_given_up():
    """After too many rollbacks without a checkpoint beyond the spike; the message lists spikes and skipped ranges."""
    back = FakeRollback()
    loop, parts = trainer(
        guarded(steps=20), FakeEngine(loss=lambda step, _: 5.0 if step == 12 else 2.0), None, None, back
    )
    with pytest.raises(DivergedError, match=r"step 12 \(loss 5.0000, z .*samples 72 to 95 skipped\); .*median 2.0000"):
        loop.run()
    assert back.spikes == [12] * 3
    assert [step for kind, step, _ in parts.journal.events if kind == "spike"] == [12] * 4


def test_spikes_that_the_run_gets_past_do_not_add_up():
    """A checkpoint beyond the spike begins the count anew; one that the run had reached before does not."""
    made = guarded(steps=24)
    made.resilience.max_rollbacks = 1
    back = FakeRollback()
    loop, _ = trainer(made, FakeEngine(loss=lambda step, count: 5.0 if count in (12, 24) else 2.0), rollback=back)
    assert loop.run() == "done" and back.spikes == [12, 20]
    loop, _ = trainer(made, FakeEngine(loss=lambda step, count: 5.0 if count in (12, 24, 35) else 2.0), rollback=back)
    with pytest.raises(DivergedError):  # at step 19, before it was past 20 again
        loop.run()


def test_a_spike_without_a_checkpoint_is_told_and_borne():
    """There is nowhere to go back to: the run goes on, and says so."""
    engine = FakeEngine(loss=lambda step, count: 5.0 if step == 9 else 2.0)
    loop, parts = trainer(guarded(), engine)
    assert loop.run() == "done" and len(parts.journal.records) == 10
    assert [step for kind, step, _ in parts.journal.events if kind == "spike_kept"] == [9]


def test_the_guard_judges_the_losses_of_steps_that_moved_parameters():
    """A vetoed step's loss is neither judged nor compared with; a resumed run compares with its checkpoint's losses."""
    back = FakeRollback()
    engine = FakeEngine(finite=lambda step: step != 9, loss=lambda step, count: 5.0 if step == 9 else 2.0)
    loop, parts = trainer(guarded(), engine, rollback=back)
    assert loop.run() == "done" and back.spikes == []
    assert parts.store.saved[-1][1].progress.loss_guard.losses == [2.0] * 8
    progress = Progress(8, 64, 80, loss_guard=LossGuardState([2.0] * 8))
    engine = FakeEngine(loss=lambda step, count: 5.0 if count == 1 else 2.0)
    loop, _ = trainer(guarded(), engine, progress, rollback=back)
    assert loop.run() == "done" and back.spikes == [9]


def test_a_step_without_a_label_has_no_loss_and_the_next_is_no_spike():
    """As when all samples of a step are parts of long conversations in which nobody answers."""
    back = FakeRollback()
    loop, parts = trainer(guarded(), FakeEngine(tokens=lambda step: 0 if step < 9 else 10), rollback=back)
    assert loop.run() == "done" and back.spikes == []
    losses = [record["loss"] for record in parts.journal.records]
    assert all(map(math.isnan, losses[:8])) and losses[8:] == [2.0] * len(losses[8:])


def test_what_became_of_saves_is_told_at_the_next_step_and_giving_up_ends_the_run():
    loop, parts = trainer(config())
    parts.store.fails_from = 8
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        loop.run()
    told = [(kind, step) for kind, step, _ in parts.journal.events if kind.startswith("save")]
    assert told == [("save", 4), ("save_failed", 8)]
    assert [record["step"] for record in parts.journal.records] == list(range(1, 9)), "not one step further"
    assert [record["save_time_s"] for record in parts.journal.records][4] == 0.5


def test_a_ranks_own_time_of_a_step_goes_along_with_the_next_exchange(monkeypatch):
    """Waiting for data and the step itself, without what the rank was held up by others and without the exchange."""
    clock = {"now": 0.0, "held_up": 0.0}
    monkeypatch.setattr("megatrain.training.trainer.time", SimpleNamespace(perf_counter=lambda: clock["now"]))

    class SlowEngine(FakeEngine):
        def train_step(self, micro_batches, lr, step):
            clock["now"] += step
            clock["held_up"] += 0.4
            return super().train_step(micro_batches, lr, step)

    def slow_stream():
        while True:
            clock["now"] += 0.25
            yield StepBatch([], np.arange(8, dtype=np.uint64), 8, 8)

    def exchange(values):
        clock["now"] += 5
        clock["held_up"] += 3
        return torch.stack([values, values])

    class SlowJournal(FakeJournal):
        def step(self, record):
            clock["now"] += 7

    told = []
    loop, parts = trainer(config(steps=3), SlowEngine())
    loop.parts = replace(
        parts,
        stream=slow_stream(),
        journal=SlowJournal(),
        exchange=alone(exchange),
        clock=FakeClock(reads_late=False, blocked_s=lambda: clock["held_up"]),  # own times are measured on CPUs
        slow_ranks=lambda step, own_times: told.append((step, own_times)),
    )
    loop.run()
    assert [step for step, _ in told] == [1, 2], "before the first step there is nothing to tell"
    assert [own for _, own in told] == [pytest.approx([step - 0.4 + 0.25] * 2) for step in (1, 2)]


def test_results_are_read_late_except_where_something_is_due(late):
    """The host reads at once after a save, an evaluation, a copy and the last step; otherwise one step later."""
    seen = []

    class Journal(FakeJournal):
        def step(self, record):
            seen.append(("read", record["step"]))

    class Engine(FakeEngine):
        def train_step(self, micro_batches, lr, step):
            seen.append(("train", step))
            return super().train_step(micro_batches, lr, step)

    loop, parts = trainer(config(steps=7, eval_every=5), Engine())
    loop.parts = replace(parts, journal=Journal())
    loop.run()
    order = [1, 2, -1, 3, -2, 4, -3, -4, 5, -5, 6, 7, -6, -7] if late else [n for s in range(1, 8) for n in (s, -s)]
    assert seen == [("train", n) if n > 0 else ("read", -n) for n in order]
    assert [step for step, _ in parts.store.saved] == [4, 7]


@pytest.mark.parametrize("where", ["data", "step", "exchange"])
def test_what_fails_does_not_take_the_record_before_along(where):
    """Nothing but the record: what is due behind the step would need the other ranks."""

    class Engine(FakeEngine):
        def train_step(self, micro_batches, lr, step):
            if where == "step" and step == 3:
                raise OSError("gone")
            return super().train_step(micro_batches, lr, step)

    def broken():
        for cursor in (8, 16, 24):
            if where == "data" and cursor == 24:
                raise OSError("gone")
            yield StepBatch([], np.arange(8, dtype=np.uint64), 8, cursor)

    def exchange(values):
        if where == "exchange" and len(engine.trained) == 2:
            raise OSError("gone")
        return values.unsqueeze(0)

    engine = Engine()
    loop, parts = trainer(config(steps=7), engine)
    loop.parts = replace(parts, stream=broken(), exchange=alone(exchange))
    with pytest.raises(OSError, match="gone"):
        loop.run()
    assert [record["step"] for record in parts.journal.records] == [1, 2]


def test_a_result_that_does_not_come_is_not_waited_for(monkeypatch):
    """The device waits for a rank that is gone: what failed is told nonetheless."""
    monkeypatch.setattr("megatrain.training.trainer.LAST_RESULT_S", 0.05)
    never = SimpleNamespace(query=lambda: False)
    sent = SentResult(StepResult(*(torch.tensor(1.0),) * 4), never)
    assert not sent.comes_within(0.05)
    never.query = lambda: True
    assert sent.comes_within(0.05)


def test_a_step_takes_as_long_as_the_device_says(late):
    """From the mark before it to the one behind it, however late the host looks."""

    class Mark:
        def __init__(self, ms):
            self.ms = ms

        def elapsed_time(self, end):
            return end.ms - self.ms

        def synchronize(self):
            pass

        query = record = synchronize

    class Engine(FakeEngine):
        def train_step(self, micro_batches, lr, step):
            result = super().train_step(micro_batches, lr, step)
            return SimpleNamespace(sent=lambda: SentResult(result, Mark(1000.0 * step + 250)))

    loop, parts = trainer(config(steps=5), Engine())
    marks = iter(range(1, 6))
    loop.parts = replace(parts, clock=FakeClock(event=lambda: Mark(1000.0 * next(marks))))
    loop.run()
    assert [record["step_time_s"] for record in parts.journal.records] == [0.25] * 5
    assert [record["tokens_per_s"] for record in parts.journal.records] == [40.0] * 5


def test_no_copy_that_cannot_be_made_keeps_results_from_being_read_late(late):
    """Where copies were given up, or a save takes long, nothing is due."""
    order = []

    class Engine(FakeEngine):
        def train_step(self, micro_batches, lr, step):
            order.append(step)
            return super().train_step(micro_batches, lr, step)

    class Journal(FakeJournal):
        def step(self, record):
            order.append(-record["step"])

    made = config(steps=6)
    made.checkpoint.every = 0
    loop, parts = trainer(made, Engine(), copies_every=2)
    parts.store.busy = lambda step: True
    loop.parts = replace(parts, journal=Journal())
    loop.run()
    expected = [1, 2, -1, 3, -2, 4, -3, 5, -4, 6, -5, -6] if late else [n for s in range(1, 7) for n in (s, -s)]
    assert order == expected and parts.store.copied == []

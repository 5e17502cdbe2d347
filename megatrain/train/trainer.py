"""The loop and nothing else: batch -> engine -> metrics -> checkpoint.

It speaks to protocols (an engine, a stream of batches, a checkpoint store, a journal) and knows neither layouts nor ranks;
whoever starts it (launch/worker.py) hands it the parts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from megatrain.config import TrainConfig
from megatrain.data.batch import MicroBatch, StepBatch
from megatrain.engine.protocol import Engine, SentResult
from megatrain.errors import DivergedError
from megatrain.optim.schedule import learning_rate
from megatrain.resilience.guard import LossGuard, Spike, report

LAST_RESULT_S = 5.0
"""Longest wait for the result of the last step before something failed."""


@dataclass
class Progress:
    """Where a run stands: what a checkpoint keeps beside the engine's state.

    `step` counts finished optimizer steps, `cursor` the samples consumed, `tokens` those that counted in the loss.
    `losses` are those that the guard compares the next one with, `rollbacks` the spikes it has gone back from without
    getting past them since.
    """

    step: int = 0
    cursor: int = 0
    tokens: int = 0
    skip_ranges: list[tuple[int, int]] = field(default_factory=list)
    best_heldout_loss: float | None = None
    evaluations_without_gain: int = 0
    losses: list[float] = field(default_factory=list)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    def to_manifest(self) -> dict[str, Any]:
        """The manifest's keys, `step` apart."""
        return {
            "cursor": self.cursor,
            "tokens": self.tokens,
            "skip_ranges": self.skip_ranges,
            "early_stop": {
                "best_heldout_loss": self.best_heldout_loss,
                "evaluations_without_gain": self.evaluations_without_gain,
            },
            "loss_guard": {"losses": self.losses, "rollbacks": self.rollbacks},
        }

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> Progress:
        """Where the checkpoint's run stood."""
        return cls(
            step=manifest["step"],
            cursor=manifest["cursor"],
            tokens=manifest["tokens"],
            skip_ranges=[(start, stop) for start, stop in manifest["skip_ranges"]],
            **manifest["early_stop"],
            **manifest.get("loss_guard", {}),  # older manifests have none
        )

    def become(self, other: Progress) -> None:
        """Stand where another one stands; whoever holds this one sees it."""
        for f in fields(other):
            setattr(self, f.name, getattr(other, f.name))


class Store(Protocol):
    """Where checkpoints go."""

    def save(self, step: int, state: dict[str, Tensor], extra: dict[str, Any]) -> float:
        """Begin to write a checkpoint; returns the seconds that this held the loop up."""

    def copy(self, step: int, state: dict[str, Tensor], extra: dict[str, Any]) -> float:
        """Begin to keep a copy in memory that survives this process; the seconds that this held the loop up."""

    @property
    def can_copy(self) -> bool:
        """Whether a copy can be made now."""

    @property
    def has_failed(self) -> bool:
        """Whether saving was given up."""

    def reports(self) -> list[tuple[str, int, dict[str, Any]]]:
        """What became of saves since this was asked last: events' kinds, steps and details."""

    def finish(self) -> None:
        """Wait until everything is written; raises what made saving give up."""


class Journal(Protocol):
    """Where metrics and events go; on all ranks but the main one it does nothing."""

    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step's record."""

    def event(self, kind: str, step: int, **detail: Any) -> None:
        """Something that happened."""


@dataclass(frozen=True)
class Parts:
    """What the loop works with.

    `exchange` gathers a CPU int64 tensor of every rank (`[ranks, n]`); `batch_hash` makes the hash of a step from every
    rank's sample hashes; `heldout` gives this rank's held-out batches anew; `copies_every` are the steps between copies in
    memory (0: none); `stopping` says whether this rank was asked
    to stop; `mark` tells the watchdog which phase of which step begins; `roll_back` takes engine and stream back to before
    a spike and returns where the run then stands (None: there is nowhere to go back to); `bytes_per_token` is the held-out
    text's, `peak_flops` the whole job's (None where unknown); `held_up` tells the seconds in which this rank could not do
    its own work so far, for it waited for others, and `compare` is told every rank's own seconds of a step, without those.
    `reads_late`: a step's result is read once the next step has been handed to the device, which then never waits for the
    host; `stamp` then marks the beginning of a step in the device's work, since the host's clock tells when it looked.
    """

    engine: Engine
    stream: Iterator[StepBatch]
    heldout: Callable[[], Iterable[MicroBatch]] | None
    store: Store
    journal: Journal
    exchange: Callable[[Tensor], Tensor]
    batch_hash: Callable[[np.ndarray], str]
    copies_every: int
    stopping: Callable[[], int]
    mark: Callable[[str, int], None]
    roll_back: Callable[[Progress, Spike], Progress | None]
    identity: dict[str, Any]
    flops_per_token: int
    peak_flops: float | None
    bytes_per_token: float | None
    held_up: Callable[[], float] = lambda: 0.0
    compare: Callable[[int, list[float]], None] = lambda step, own_times: None
    reads_late: bool = False
    stamp: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Unread:
    """A step that was handed to the device and whose result has not been looked at."""

    step: int
    lr: float
    began: Any
    result: SentResult
    cursor: int
    hashes: np.ndarray
    data_time: float
    save_time: float


class Trainer:
    """Runs a training job from `progress` to its last step."""

    def __init__(self, config: TrainConfig, parts: Parts, progress: Progress, on_disk: bool = True) -> None:
        """`on_disk`: a start from `progress` needs no further checkpoint, as it does where it was a copy in memory."""
        self.config = config
        self.parts = parts
        self.progress = progress
        self.saved_step, self.copied_step = progress.step if on_disk else -1, progress.step
        self.can_copy = False
        self.skipped_in_a_row = 0
        self.guard = LossGuard.from_config(config.resilience)
        self.own_time = self.own_until = 0.0
        self.unread: Unread | None = None
        self.read_at = 0.0
        self.save_time = 0.0

    def run(self) -> str:
        """Train; returns `done` (all steps, or early stopping) or `stopped` (saved after a signal).

        Raises:
            DivergedError: no finite gradient for `resilience.max_skipped` steps, an overflow at the smallest loss scale,
                or a loss that spiked once more after `resilience.max_rollbacks` rollbacks.
        """
        try:
            return self._loop()
        except BaseException:
            self._leave_record()
            raise

    def _loop(self) -> str:
        total = self.config.train.steps
        while (step := self._next_step()) <= total and not self._has_stalled():
            started, free = time.perf_counter(), self._own_clock()
            if self.unread is None:
                self.read_at = started
            began = self.parts.stamp()
            self.parts.mark("data", step)
            batch = next(self.parts.stream)
            data_time, own_time = time.perf_counter() - started, self._own_clock() - free
            self.parts.mark("exchange", step)
            hashes, signal_number, saving_failed = self._meet(batch)
            self._report_saves()
            if signal_number or saving_failed:
                self._read()
            if saving_failed:
                self._wait_for_saves()
            if signal_number:
                self.parts.journal.event("signal", self.progress.step, signal=signal_number)
                self._save_and_wait()
                self.parts.mark("end", self.progress.step)
                return "stopped"
            free = self._own_clock()
            lr = learning_rate(self.config.optim, step, total)
            result = self.parts.engine.train_step(batch.micro_batches, lr, step)
            self.own_until = self._own_clock()
            now = Unread(step, lr, began, result.sent(), batch.cursor, hashes, data_time, self.save_time)
            self.save_time = 0.0
            if self._read(late=True):
                continue  # back before a spike: what has just been done was done in vain
            self.unread = now
            if not self.parts.reads_late or self._is_due(step):
                self._read()
            self.own_time = own_time + self.own_until - free
        self._save_and_wait()
        self.parts.mark("end", self.progress.step)
        return "done"

    def _next_step(self) -> int:
        """The step to do next."""
        return self.progress.step + (1 if self.unread is None else 2)

    def _is_due(self, step: int) -> bool:
        """Whether something is to happen right behind a step, before the next one changes the parameters."""
        loop, checkpoint = self.config.train, self.config.checkpoint
        often = [loop.eval_every if self.parts.heldout else 0, checkpoint.every]
        return step == loop.steps or self._copy_is_due(step) or any(every and step % every == 0 for every in often)

    def _copy_is_due(self, step: int) -> bool:
        """Whether the state behind a step is to be copied into memory, and can be."""
        last = max(self.saved_step, self.copied_step)
        return self.can_copy and step < self.config.train.steps and 0 < self.parts.copies_every <= step - last

    def _read(self, late: bool = False) -> bool:
        """Look at the result of the step that was not looked at yet, if there is one, and do what is due behind it.

        `late`: the step after it is under way, so that the parameters are no longer those behind it, and nothing is due.
        Returns whether the run went back before it.
        """
        if self.unread is None:
            return False
        unread, self.unread = self.unread, None
        record = self._record(unread)
        self.own_until = self._own_clock()
        now = time.perf_counter()
        step_time, self.read_at = unread.result.seconds_since(unread.began) or now - self.read_at, now
        eval_time = self._maybe_evaluate(record)
        self._add_times(record, step_time, unread.data_time, eval_time, unread.save_time)
        self.parts.journal.step(record)  # before the save: a resume needs the record of the step it continues from
        went_back = self._went_back(record)
        self.save_time = self._save() if went_back else 0.0 if late else self._maybe_save()
        if self._has_stalled():
            self.parts.journal.event("early_stop", unread.step, best_heldout_loss=self.progress.best_heldout_loss)
        return went_back

    def _leave_record(self) -> None:
        """Something failed: write down the finished step that was not looked at, if its result comes soon."""
        unread, self.unread = self.unread, None
        if unread is None or not unread.result.comes_within(LAST_RESULT_S):
            return
        with suppress(Exception):  # what failed first is what counts
            record = self._record(unread)
            self._add_times(record, time.perf_counter() - self.read_at, unread.data_time, 0.0, unread.save_time)
            self.parts.journal.step(record)

    def _own_clock(self) -> float:
        """Seconds that go by while this rank is not held up by others."""
        return time.perf_counter() - self.parts.held_up()

    def _meet(self, batch: StepBatch) -> tuple[np.ndarray, int, bool]:
        """All ranks' sample hashes, the signal that any rank has received, and whether any can save no more: one exchange
        a step. With it go all ranks' own times of the step before."""
        store = self.parts.store
        state = [self.parts.stopping(), int(store.has_failed), int(store.can_copy), int(self.own_time * 1e9)]
        mine = np.concatenate([state, batch.sample_hashes.view(np.int64)]).astype(np.int64)
        everyone = self.parts.exchange(torch.from_numpy(mine)).numpy()
        self.can_copy = bool(everyone[:, 2].all())
        if self.own_time:  # every rank has done a step, or none
            self.parts.compare(self.progress.step, (everyone[:, 3] / 1e9).tolist())
        return everyone[:, 4:].view(np.uint64), int(everyone[:, 0].max()), bool(everyone[:, 1].any())

    def _record(self, unread: Unread) -> dict[str, Any]:
        """Read a step's result, move on, and make its metrics record."""
        step, result = unread.step, unread.result.read()
        tokens, updated = int(result.tokens), bool(result.updated)
        self.progress.step, self.progress.cursor = step, unread.cursor
        self.progress.tokens += tokens
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        loss = float(result.loss_sum) / max(1, tokens)
        if not updated:
            what = "gradient norm" if math.isfinite(loss) else "loss"
            self.parts.journal.event("skip", step, reason=f"non-finite {what}")
        if self.skipped_in_a_row >= self.config.resilience.max_skipped:
            raise DivergedError(
                f"no finite gradient in the last {self.skipped_in_a_row} steps (resilience.max_skipped, up to step {step}); "
                f"lower optim.lr or start again from an earlier checkpoint"
            )
        return {
            "step": step,
            "loss": loss,
            "grad_norm": float(result.grad_norm),
            "lr": unread.lr,
            "tokens": self.progress.tokens,
            "step_tokens": tokens,
            "updated": updated,
            "batch_hash": self.parts.batch_hash(unread.hashes),
            **{name: float(value) for name, value in result.aux.items()},
        }

    def _add_times(
        self, record: dict[str, Any], step_time: float, data_time: float, eval_time: float, save_time: float
    ) -> None:
        """Complete a record. `step_time_s` leaves evaluation and saving out; `save_time_s` is the save before the step."""
        rate = record.pop("step_tokens") / step_time
        peak = self.parts.peak_flops
        record["step_time_s"] = step_time
        record["tokens_per_s"] = rate
        record["mfu"] = rate * self.parts.flops_per_token / peak if peak else None
        record["data_time_s"] = data_time
        record["eval_time_s"] = eval_time
        record["save_time_s"] = save_time

    def _maybe_evaluate(self, record: dict[str, Any]) -> float:
        """Evaluate if it is time; returns the seconds it took."""
        every, step = self.config.train.eval_every, record["step"]
        last = step == self.config.train.steps
        if self.parts.heldout is None or not (last or (every and step % every == 0)):
            return 0.0
        started = time.perf_counter()
        loss_sum, tokens = self.parts.engine.evaluate(self._marked(self.parts.heldout(), step))
        loss = float(loss_sum) / max(1, int(tokens))
        record["heldout_loss"] = loss
        detail = {"heldout_loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": int(tokens)}
        if self.parts.bytes_per_token:
            detail["bits_per_byte"] = loss / math.log(2) / self.parts.bytes_per_token
        best = self.progress.best_heldout_loss
        if math.isfinite(loss) and (best is None or loss < best - self.config.train.early_stop_min_delta):
            self.progress.best_heldout_loss, self.progress.evaluations_without_gain = loss, 0
        else:
            self.progress.evaluations_without_gain += 1
        self.parts.journal.event("evaluate", step, **detail)
        return time.perf_counter() - started

    def _marked(self, batches: Iterable[MicroBatch], step: int) -> Iterator[MicroBatch]:
        """Held-out batches, each a sign of life."""
        for batch in batches:
            self.parts.mark("evaluate", step)
            yield batch

    def _went_back(self, record: dict[str, Any]) -> bool:
        """Judge a step's loss; where it is a spike, go back and stand before it."""
        step, loss = record["step"], record["loss"]
        if not record["updated"]:
            return False
        before = self.progress.losses
        self.progress.losses = self.guard.remember(before, loss)
        spike = self.guard.judge(before, step, loss)
        if spike is None:
            return False
        self.parts.journal.event("spike", step, loss=loss, zscore=spike.zscore, median=spike.median)
        self._wait_for_saves()  # what is being written may be what to go back to
        if len(self.progress.rollbacks) >= self.config.resilience.max_rollbacks:
            raise DivergedError(
                f"the loss spiked again after resilience.max_rollbacks={self.config.resilience.max_rollbacks} rollbacks: "
                f"{report(spike, self.progress.rollbacks)}; lower optim.lr in a new run, or raise resilience.spike_zscore "
                f"if these losses are what they should be"
            )
        there = self.parts.roll_back(self.progress, spike)
        if there is None:
            self.parts.journal.event("spike_kept", step, reason="there is no checkpoint before it to go back to")
            return False
        self.progress.become(there)
        self.saved_step, self.copied_step = (
            -1,
            self.progress.step,
        )  # what is on disk leaves nothing out yet: a death now would meet the spike again
        return True

    def _maybe_save(self) -> float:
        """Save, or copy, if it is time; returns the seconds it held the loop up."""
        every, step = self.config.checkpoint.every, self.progress.step
        if every and step % every == 0:
            return self._save()
        if self._copy_is_due(step):
            self.parts.mark("save", step)
            self.copied_step = step
            return self.parts.store.copy(step, self.parts.engine.state(), self._extra())
        return 0.0

    def _save(self) -> float:
        """Begin to save where the run stands, unless that was done already; returns the seconds it held the loop up."""
        if self.saved_step == self.progress.step:
            return 0.0
        self.parts.mark("save", self.progress.step)
        if self.progress.step > max((seen["step"] for seen in self.progress.rollbacks), default=0):
            self.progress.rollbacks = []  # past the trouble
        try:
            stall = self.parts.store.save(self.progress.step, self.parts.engine.state(), self._extra())
        except BaseException:  # given up while this one waited for the save before
            self._report_saves()
            raise
        self.saved_step = self.progress.step
        return stall

    def _extra(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the engine's state."""
        return {**self.progress.to_manifest(), **self.parts.engine.counters(), **self.parts.identity}

    def _save_and_wait(self) -> None:
        """See that where the run stands is on the disk."""
        self._save()
        self._wait_for_saves()

    def _wait_for_saves(self) -> None:
        self.parts.mark("save", self.progress.step)
        try:
            self.parts.store.finish()
        finally:
            self._report_saves()

    def _report_saves(self) -> None:
        for kind, step, detail in self.parts.store.reports():
            self.parts.journal.event(kind, step, **detail)

    def _has_stalled(self) -> bool:
        """Whether early stopping ends the run here; a run that it ended stays ended when it is started again."""
        patience = self.config.train.early_stop_patience
        return 0 < patience <= self.progress.evaluations_without_gain

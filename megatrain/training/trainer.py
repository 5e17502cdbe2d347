"""The training loop: batch → engine → metrics → checkpoint. `job.py` assembles its collaborators (`protocols.py`)."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from megatrain.checkpoint.manifest import EarlyStop, Progress, RunRecord
from megatrain.checkpoint.resume import override_of
from megatrain.config import TrainConfig
from megatrain.data.batch import MicroBatch, StepBatch
from megatrain.errors import DivergedError, RewardError
from megatrain.optim.objective import SQUARED, TOKENS
from megatrain.optim.schedule import learning_rate
from megatrain.resilience.guard import LossGuard, report
from megatrain.training.evaluation import Evaluation
from megatrain.training.exchange import JobReport, RankReport
from megatrain.training.in_flight import InFlight, SubmittedStep
from megatrain.training.protocols import Parts, TaskScorer

BATCH_COUNTS = ("num_batches", "all_batches")
"""Fields of the event `evaluate`: the batches that it read, and those of the whole held-out data."""

LAST_RESULT_S = 5.0
"""Longest wait, after a failure, for the result of the last submitted step."""


class Trainer:
    """Training loop of one rank, from `progress` to the last step."""

    def __init__(self, config: TrainConfig, parts: Parts, progress: Progress, on_disk: bool = True) -> None:
        """`on_disk`: whether `progress` is already saved on disk. It is not after a start from a copy in memory."""
        self.config = config
        self.parts = parts
        self.progress = progress
        self.in_flight = InFlight()
        self.guard = LossGuard.from_config(config.resilience)
        self.skipped_in_a_row = 0
        self.saved_step, self.copied_step = progress.step if on_disk else -1, progress.step
        self.all_can_copy = False
        self.save_time = 0.0
        self.own_time = self.own_until = 0.0
        self.read_at = 0.0

    def run(self) -> str:
        """Train; return `done` (all steps, or early stopping) or `stopped` (saved after a signal).

        Raises:
            DivergedError: no gradient was finite for `resilience.max_skipped` steps, gradients overflowed at the
                smallest loss scale, or the loss spiked again after `resilience.max_rollbacks` rollbacks.
        """
        try:
            return self._loop()
        except BaseException:
            self._record_last_step()
            raise

    def _loop(self) -> str:
        while self._next_step() <= self.config.train.steps and not self._has_stalled():
            step = self._next_step()
            started, own_started = time.perf_counter(), self._own_clock()
            if self.in_flight.is_idle:
                self.read_at = started
            began = self.parts.clock.event()
            self.parts.clock.enter("data", step)
            batch = self._next_batch()
            data_time, own_data_time = time.perf_counter() - started, self._own_clock() - own_started
            self.parts.clock.enter("exchange", step)
            job = self._exchange(batch)
            if self._stops(job):
                return "stopped"
            own_started = self._own_clock()
            submitted = self._submit(step, began, batch, job, data_time)
            if self._finish_step(is_latest=False):
                continue  # rolled back: the submitted step is discarded
            self.in_flight.hold(submitted)
            if not self.parts.clock.reads_late or self._is_due(step):
                self._finish_step(is_latest=True)
            self.own_time = own_data_time + self.own_until - own_started
        self._save_and_wait()
        self.parts.clock.enter("end", self.progress.step)
        return "done"

    # ---------------------------------------------------------------------------------------------- before a step

    def _next_step(self) -> int:
        """Return the step to submit next."""
        return self.progress.step + (1 if self.in_flight.is_idle else 2)

    def _next_batch(self) -> StepBatch:
        """Return the next batch. If a reward fails, which all ranks then know, save before the run ends with that."""
        try:
            return next(self.parts.stream)
        except RewardError:
            self._finish_step(is_latest=True)
            self._save_and_wait()
            raise

    def _exchange(self, batch: StepBatch) -> JobReport:
        """Send this rank's report to all ranks and return the combined report."""
        store = self.parts.store
        mine = RankReport(
            self.parts.stop.signal_number, store.has_failed, store.can_copy, self.own_time, batch.sample_hashes
        )
        job = self.parts.exchange(mine)
        self.all_can_copy = job.can_copy
        if self.own_time:  # either every rank has done a step, or none has
            self.parts.slow_ranks(self.progress.step, job.own_times)
        self._report_saves()
        return job

    def _stops(self, job: JobReport) -> bool:
        """If any rank was asked to stop, save and return True. If saving has failed for good on any rank, raise."""
        if job.signal_number or job.save_failed:
            self._finish_step(is_latest=True)
        if job.save_failed:
            self._wait_for_saves()
        if job.signal_number:
            self.parts.journal.event("signal", self.progress.step, signal=job.signal_number)
            self._save_and_wait()
            self.parts.clock.enter("end", self.progress.step)
        return bool(job.signal_number)

    def _submit(self, step: int, began: Any, batch: StepBatch, job: JobReport, data_time: float) -> SubmittedStep:
        """Submit a step to the engine."""
        lr = learning_rate(self.config.optim, step, self.config.train.steps)
        result = self.parts.engine.train_step(batch.micro_batches, lr, step)
        self.own_until = self._own_clock()
        save_time, self.save_time = self.save_time, 0.0
        sent = result.sent()
        return SubmittedStep(step, lr, began, sent, batch.cursor, job.batch_hash, data_time, save_time, batch.metrics)

    # ---------------------------------------------------------------------------------------------- after a step

    def _finish_step(self, is_latest: bool) -> bool:
        """Read the step in flight, if any; record it, then evaluate, save or roll back as needed.

        If `is_latest`, no later step is queued and parameters are current; if not, nothing due needs them. Return
        whether the run was rolled back.
        """
        step = self.in_flight.release()
        if step is None:
            return False
        record = self._record(step)
        self.own_until = self._own_clock()
        now = time.perf_counter()
        step_time, self.read_at = step.result.seconds_since(step.began) or now - self.read_at, now
        eval_time = self._evaluate_if_due(record)
        eval_time += self._score_if_due("tasks", self.parts.tasks, self.config.train.tasks_every, record)
        eval_time += self._score_if_due("heldout_replies", self.parts.replies, self.config.train.eval_every, record)
        self._add_times(record, step, step_time, eval_time)
        self.parts.journal.step(record)  # before the save: a resume needs the record of the step it continues from
        rolled_back = self._roll_back_if_spiked(record)
        if rolled_back:
            self.save_time = self._save()
        elif is_latest:
            self.save_time = self._save_if_due()
        else:
            self.save_time = 0.0
        if self._has_stalled():
            best = self.progress.early_stop.best_heldout_loss
            self.parts.journal.event("early_stop", step.step, best_heldout_loss=best)
        return rolled_back

    def _record(self, step: SubmittedStep) -> dict[str, Any]:
        """Read a step's result, advance the progress, and return its metrics."""
        result = step.result.read()
        terms, updated = int(result.tokens), bool(result.updated)
        scalars = {name: float(value) for name, value in result.aux.items() if not name.endswith(SQUARED)}
        tokens = round(terms * scalars.pop(TOKENS, 1.0))
        self.progress.step, self.progress.cursor = step.step, step.cursor
        self.progress.tokens += tokens
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        loss = float(result.loss_sum) / terms if terms else math.nan  # parts of long conversations have no replies
        if not updated:
            cause = "gradient norm" if math.isfinite(loss) else "loss"
            self.parts.journal.event("skip", step.step, reason=f"non-finite {cause}")
        if self.skipped_in_a_row >= self.config.resilience.max_skipped:
            raise DivergedError(
                f"no finite gradient in the last {self.skipped_in_a_row} steps (resilience.max_skipped, up to step "
                f"{step.step}); {self._advice()}"
            )
        return {
            "step": step.step,
            "loss": loss,
            "grad_norm": float(result.grad_norm),
            "lr": step.lr,
            "tokens": self.progress.tokens,
            "step_tokens": tokens,
            "updated": updated,
            "batch_hash": step.batch_hash,
            **scalars,
            **step.metrics,
        }

    def _advice(self) -> str:
        """Return what to do about a run that diverged, as arguments that can be pasted."""
        return (
            f"continue with a lower learning rate: optim.lr={self.config.optim.lr / 3:.3g} {override_of(['optim.lr'])} "
            f"(to go back further, add checkpoint.resume=<path of an earlier checkpoint>)"
        )

    def _add_times(self, record: dict[str, Any], step: SubmittedStep, step_time: float, eval_time: float) -> None:
        """Add times to a record. `step_time_s` excludes evaluation and saving; `save_time_s` is the preceding save."""
        rate = record.pop("step_tokens") / step_time
        record["step_time_s"] = step_time
        record["tokens_per_s"] = rate
        record["mfu"] = self.parts.throughput.mfu(rate)
        record["data_time_s"] = step.data_time
        record["eval_time_s"] = eval_time
        record["save_time_s"] = step.save_time

    def _record_last_step(self) -> None:
        """After a failure: record the step in flight, if its result arrives soon."""
        step = self.in_flight.release()
        if step is None:
            return
        with suppress(Exception):  # the first failure is the one to report
            if not step.result.comes_within(LAST_RESULT_S):
                return
            record = self._record(step)
            self._add_times(record, step, time.perf_counter() - self.read_at, 0.0)
            self.parts.journal.step(record)

    def _own_clock(self) -> float:
        """Return the seconds of a clock that stops while this rank waits for others."""
        return time.perf_counter() - self.parts.clock.blocked_s()

    # ---------------------------------------------------------------------------------------------- evaluation

    def _evaluate_if_due(self, record: dict[str, Any]) -> float:
        """Evaluate if this is an evaluation step or the last step; return the seconds it took."""
        every, step = self.config.train.eval_every, record["step"]
        is_last = step == self.config.train.steps
        if not self.parts.heldout or not (is_last or (every and step % every == 0)):
            return 0.0
        started = time.perf_counter()
        evaluation = Evaluation()
        for number, share in enumerate(self.parts.heldout):
            measured = self.parts.engine.measure(self._with_signs_of_life(number, step))
            scalars = {name: float(value) for name, value in measured.scalars.items()}
            evaluation.add(share, float(measured.loss_sum), int(measured.count), scalars)
        loss = evaluation.loss
        record |= evaluation.metrics()
        detail = evaluation.detail() | ({"sources": shares} if (shares := self.parts.shares(self.progress)) else {})
        detail |= {name: sum(getattr(share, name) for share in self.parts.heldout) for name in BATCH_COUNTS}
        seen = self.progress.early_stop
        best = seen.best_heldout_loss
        if math.isfinite(loss) and (best is None or loss < best - self.config.train.early_stop_min_delta):
            self.progress.early_stop = EarlyStop(loss, 0)
        else:
            self.progress.early_stop = EarlyStop(best, seen.evaluations_without_gain + 1)
        self.parts.journal.event("evaluate", step, **detail)
        return time.perf_counter() - started

    def _score_if_due(self, kind: str, scorer: TaskScorer | None, every: int, record: dict[str, Any]) -> float:
        """Score the weights if that is due after this step, or it is the last; return the seconds it took."""
        step = record["step"]
        is_last = step == self.config.train.steps
        if scorer is None or not (is_last or (every and step % every == 0)):
            return 0.0
        started = time.perf_counter()

        def beat(words: str) -> None:
            self.parts.clock.enter("evaluate", step)
            self.parts.journal.progress(step, words)

        scores = scorer(step, beat)
        record |= scores
        self.parts.journal.event(kind, step, **{name.removeprefix("tasks/"): one for name, one in scores.items()})
        return time.perf_counter() - started

    def _with_signs_of_life(self, number: int, step: int) -> Iterator[MicroBatch]:
        """Yield the batches of a held-out share; report the start of each to the agent and show how far they are."""
        shares = self.parts.heldout
        share, before = shares[number], sum(share.num_batches for share in shares[:number])
        total = sum(share.num_batches for share in shares)
        for index, batch in enumerate(share.batches()):
            self.parts.clock.enter("evaluate", step)
            self.parts.journal.progress(step, f"evaluating {before + share.batches_done(index)}/{total} batches")
            yield batch

    def _has_stalled(self) -> bool:
        """Whether early stopping ends the run. If it did so before, a restarted run ends at once."""
        patience = self.config.train.early_stop_patience
        return 0 < patience <= self.progress.early_stop.evaluations_without_gain

    # ---------------------------------------------------------------------------------------------- loss spikes

    def _roll_back_if_spiked(self, record: dict[str, Any]) -> bool:
        """If a step's loss is a spike, roll back to a checkpoint before it. Return whether that was done."""
        step, loss = record["step"], record["loss"]
        if not record["updated"]:
            return False
        seen = self.progress.loss_guard
        self.progress.loss_guard = replace(seen, losses=self.guard.remember(seen.losses, loss))
        spike = self.guard.judge(seen.losses, step, loss)
        if spike is None:
            return False
        self.parts.journal.event("spike", step, loss=loss, zscore=spike.zscore, median=spike.median)
        self._wait_for_saves()  # the pending save may be the one to roll back to
        if len(seen.rollbacks) >= self.config.resilience.max_rollbacks:
            raise DivergedError(
                f"the loss spiked again after resilience.max_rollbacks={self.config.resilience.max_rollbacks} "
                f"rollbacks: {report(spike, seen.rollbacks)}; {self._advice()}; or raise "
                f"resilience.spike_zscore if these losses are as expected"
            )
        progress = self.parts.rollback(self.progress, spike)
        if progress is None:
            self.parts.journal.event("spike_kept", step, reason="there is no checkpoint before it to go back to")
            return False
        self.progress.assign(progress)
        # The checkpoint on disk lacks the new skip range: a run resumed from it would reach the spike again.
        self.saved_step, self.copied_step = -1, self.progress.step
        return True

    # ---------------------------------------------------------------------------------------------- checkpoints

    def _is_due(self, step: int) -> bool:
        """Whether an evaluation, save or copy must happen before the next step changes the parameters."""
        loop, checkpoint = self.config.train, self.config.checkpoint
        intervals = [loop.eval_every if self.parts.heldout or self.parts.replies else 0, checkpoint.every]
        intervals.append(loop.tasks_every if self.parts.tasks else 0)
        is_due = any(every and step % every == 0 for every in intervals)
        return step == loop.steps or is_due or self._copy_is_due(step)

    def _copy_is_due(self, step: int) -> bool:
        """Whether a copy into memory is due after a step and can be made."""
        newest = max(self.saved_step, self.copied_step)
        is_due = 0 < self.parts.store.copies_every <= step - newest
        return self.all_can_copy and step < self.config.train.steps and is_due

    def _save_if_due(self) -> float:
        """Save, or copy into memory, if due; return the seconds for which the loop was blocked."""
        every, step = self.config.checkpoint.every, self.progress.step
        if every and step % every == 0:
            return self._save()
        if self._copy_is_due(step):
            self.parts.clock.enter("save", step)
            self.copied_step = step
            return self.parts.store.copy(self.parts.state(step), self._run_record())
        return 0.0

    def _save(self) -> float:
        """Start saving the state unless it is saved already; return the seconds for which the loop was blocked."""
        if self.saved_step == self.progress.step:
            return 0.0
        self.parts.clock.enter("save", self.progress.step)
        guard = self.progress.loss_guard
        if self.progress.step > max((spike["step"] for spike in guard.rollbacks), default=0):
            self.progress.loss_guard = replace(guard, rollbacks=[])  # the run is past its spikes
        try:
            stall = self.parts.store.save(self.parts.state(self.progress.step), self._run_record())
        except BaseException:  # the previous save failed for good while this one waited for it
            self._report_saves()
            raise
        self.saved_step = self.progress.step
        return stall

    def _run_record(self) -> RunRecord:
        """Return what a checkpoint stores besides the engine's tensors."""
        return RunRecord(replace(self.progress), self.parts.engine.counters(), self.parts.identity)

    def _save_and_wait(self) -> None:
        """Save the state and wait until it is on the disk."""
        self._save()
        self._wait_for_saves()

    def _wait_for_saves(self) -> None:
        self.parts.clock.enter("save", self.progress.step)
        try:
            self.parts.store.finish()
        finally:
            self._report_saves()

    def _report_saves(self) -> None:
        for kind, step, detail in self.parts.store.reports():
            self.parts.journal.event(kind, step, **detail)

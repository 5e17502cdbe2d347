"""The composition root of a rank: find the checkpoint to start from, build the trainer's collaborators, and train."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.continued_mixture import check_run_caps, continue_mixture, weighs_others
from megatrain.checkpoint.manifest import EarlyStop, Identity, Override, Progress
from megatrain.checkpoint.memory_store import MemoryStore
from megatrain.checkpoint.resume import UNTOLD, check_resume, take_over
from megatrain.checkpoint.saver import Saver
from megatrain.checkpoint.store import CheckpointStore
from megatrain.checkpoint.weights import Transfer, check_tokenizer, plan_transfer, weights_fit
from megatrain.config import OptimConfig, TrainConfig
from megatrain.config.plain import plain
from megatrain.data.loader import TrainStream, in_sample_order, step_hash
from megatrain.data.mixture import seen_shares
from megatrain.data.order import Order, merge_ranges
from megatrain.distributed.devices import peak_flops
from megatrain.distributed.rank_environment import was_requeued
from megatrain.distributed.waits import timed_waits
from megatrain.distributed.world import World
from megatrain.engine.build import build_engine
from megatrain.engine.protocol import Engine
from megatrain.model.count import flops_per_token, num_parameters, value_shapes
from megatrain.optim.objectives import objective_of
from megatrain.optim.schedule import batch_size, learning_rate
from megatrain.parallel.layout import Layout, describe
from megatrain.reinforcement.judge import Judge
from megatrain.reinforcement.stream import RolloutStream
from megatrain.resilience.fault_classes import PEER, USER, classify, message_of
from megatrain.resilience.owner import Ownership
from megatrain.resilience.signals import StopRequest
from megatrain.resilience.terminal import show
from megatrain.tracking.console import Console
from megatrain.tracking.journal import Journal
from megatrain.tracking.mlflow import MlflowTracker
from megatrain.tracking.profile import ACTIVE, FIRST_TRACED, profiled_steps
from megatrain.tracking.tracker import RunInfo, Tracker, Trackers, git_commit
from megatrain.training.base_weights import BaseWeights, Compared, compare_with_base
from megatrain.training.clock import CudaClock, HostClock
from megatrain.training.datasets import HeldoutShare, RunData
from megatrain.training.exchange import RankExchange
from megatrain.training.history import nothing_to_do
from megatrain.training.origin import (
    Origin,
    choose_origin,
    copy_in_memory,
    inherited_generation,
    inherited_line,
    load_origin,
)
from megatrain.training.protocols import Clock, Parts, Throughput
from megatrain.training.rollback import CheckpointRollback
from megatrain.training.rollouts import heldout_replies, load_judge, rollout_buffers, rollout_stream
from megatrain.training.run_folder import run_folder, write_run_folder
from megatrain.training.slow_ranks import SlowRankWatch
from megatrain.training.task_scores import TaskScores, scores_tasks
from megatrain.training.teacher import Taught, give_teacher
from megatrain.training.trainer import Trainer

Stream = TrainStream | RolloutStream
MLFLOW_HELPER = "megatrain.training.mlflow_helper"
_LOG = logging.getLogger("megatrain")


@dataclass(frozen=True)
class Stores:
    """Stores of this rank's state: checkpoints on disk, and copies in the agent's memory (None: no copies)."""

    disk: CheckpointStore
    memory: MemoryStore | None


@dataclass
class RankJob:
    """One rank's part of a training job, after the rank has joined the others.

    Only rank 0 has an `owner`. `restarts` counts how often the agent has restarted the job. `preflight` holds the
    measurements of the preflight checks (None: they did not run).
    """

    data: RunData
    world: World
    stop: StopRequest
    owner: Ownership | None
    restarts: int
    preflight: dict[str, Any] | None

    def __post_init__(self) -> None:
        self.config: TrainConfig = self.data.config
        self.run_dir: Path = run_folder(self.config)
        self.layout = Layout.of(self.config, self.world.size)
        self.may_write = self.owner.check if self.owner else lambda: None
        is_main = self.world.is_main
        self.journal = Journal(self.run_dir if is_main else None, self._trackers() if is_main else None, self.may_write)
        self.progress = Progress(
            skip_ranges=merge_ranges((start, stop) for start, stop in self.config.train.skip_ranges)
        )
        self.has_begun = False
        self.changes: dict[str, tuple[Any, Any]] = {}
        """What this start changes of the run that it continues, as `{key: (before, now)}`."""
        self.overrides: list[Override] = []
        """Every key that was changed on purpose since the run began."""
        self.early_stop_reset_at: int | None = None
        """The step of a checkpoint whose best held-out loss no longer counts, as this start weighs other sources."""
        self.transfer: Transfer | None = None
        self.tasks: TaskScores | None = None
        self.compared = Compared()
        self.taught = Taught()
        self.judge: Judge | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether this rank trains on a GPU."""
        return self.world.device.type == "cuda"

    def run(self) -> str:
        """Train from the run's current step to its end; return `done` or `stopped`.

        Raises:
            MegatrainError: a user's mistake or a fault of the machine. It is recorded in the journal first.
        """
        try:
            status = self._train()
        except BaseException as error:
            self._record_failure(error)
            raise
        if self.has_begun:  # a finished run that is started again records nothing
            if shares := self._shares(self.progress):
                self.journal.event("mixture", self.progress.step, sources=shares)
            self.journal.finish(status, self.progress.step, **self._peak_memory())
        return status

    def _train(self) -> str:
        stores = self._open_stores()
        origin = self._find_origin(stores)
        if origin and origin.resumes:
            self._resume_from(origin)
            if self.progress.step >= self.config.train.steps:
                self._say_nothing_to_do()
                return "done"
        elif origin:
            self._begin_from(origin)
        if self.data.mixture:
            changed = self.changes if origin and origin.resumes else None
            check_run_caps(self.data.mixture, self.config.train, self.progress, changed)
        objective = objective_of(self.config)
        engine = build_engine(self.config, self.world, objective)
        resumed = origin if origin and origin.resumes else None
        base = BaseWeights(self.config, engine, self.world, stores.disk, resumed)
        self.taught = give_teacher(self.data, self.world, objective, resumed)
        buffers: dict[str, Tensor] = {}
        if resumed:
            self.compared = compare_with_base(base, objective, self.data, self.run_dir)
            buffers = rollout_buffers(self.config, resumed.manifest)
        if origin:
            self.world.heartbeat.enter("load")
            load_origin(origin, engine, self.world, self.transfer.taken if self.transfer else (), buffers)
        if resumed:
            stores.disk.set_aside(self.progress.step)
        else:
            self.compared = compare_with_base(base, objective, self.data, self.run_dir)
        self.judge = load_judge(self.data, self.world, resumed)
        stream = self._stream(engine, buffers)
        self.tasks = self._task_scores(engine)
        if self.world.is_main:
            write_run_folder(self.run_dir, self.config, self.data.folder)
        self._record_start(origin)
        is_on_disk = origin is None or origin.node is None
        with self._parts(engine, stores, origin, stream) as parts, self._profiler():
            return Trainer(self.config, parts, self.progress, is_on_disk).run()

    # ---------------------------------------------------------------------------------------------- where to start

    def _open_stores(self) -> Stores:
        store = CheckpointStore(
            self.run_dir / "checkpoints",
            self.world,
            lambda kind, **detail: self.journal.event(kind, self.progress.step, **detail),
            self.may_write,
        )
        memory = MemoryStore.from_environ(self.world) if self.config.checkpoint.copies_every(self.on_gpu) else None
        if self.config.checkpoint.memory_every and memory is None and self.world.is_main:
            _LOG.warning("checkpoint.memory_every needs ranks that megatrain itself started; no copies are made")
        return Stores(store, memory)

    def _find_origin(self, stores: Stores) -> Origin | None:
        """Return the copy in memory if it is newer than all checkpoints, else what the config asks for."""
        copy = copy_in_memory(stores.disk, stores.memory) if stores.memory else None
        return copy or choose_origin(self.config, stores.disk, restarted=self.restarts > 0 or was_requeued())

    def _resume_from(self, origin: Origin) -> None:
        """Check that the run may continue from a checkpoint, and take over its progress."""
        saved = origin.manifest
        mixture, folder = self.data.mixture, str(origin.folder)
        fit = partial(weights_fit, origin.folder, saved, self.data.card, self.data.folder, self.config)
        changed = check_resume(saved, asdict(self.config), None if mixture else self.data.fingerprint, folder, fit)
        if mixture:
            self.data = self.data.continued(continue_mixture(saved, mixture, self.config.train, changed, folder))
        progress, self.overrides = take_over(saved, changed)
        if self.data.mixture and weighs_others(saved, self.data.mixture, self.data.heldout):
            progress.early_stop = EarlyStop()  # losses of other sources do not compare
            self.early_stop_reset_at = progress.step
        self.progress.assign(progress)
        self.changes = {key: values for key, values in changed.items() if key not in UNTOLD}
        self.changes |= self._changed_rate(saved.identity.config)
        for key, (before, now) in self.changes.items():
            _LOG.info("resume: %s was %s in %s and is now %s", key, plain(before), origin.folder, plain(now))

    def _changed_rate(self, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the learning rate of the next step as it was planned and as it is now, if they differ."""
        known = {f.name for f in fields(OptimConfig)}
        optim = OptimConfig(**{name: value for name, value in saved.get("optim", {}).items() if name in known})
        step, steps = self.progress.step + 1, self.config.train.steps
        planned = learning_rate(optim, step, saved.get("train", {}).get("steps", steps))
        now = learning_rate(self.config.optim, step, steps)
        return {f"learning rate of step {step}": (planned, now)} if planned != now else {}

    def _begin_from(self, origin: Origin) -> None:
        """Check that the weights of another run's checkpoint belong to this run's model and tokenizer."""
        folder, manifest = origin.folder, origin.manifest
        check_tokenizer(folder, manifest, self.data.card, self.data.folder, self.config)
        planned = plan_transfer(folder, manifest, self.config.model, self.config.checkpoint.override)
        begun = value_shapes(self.config.model, self.config.method)  # a base has no value head, or one of other rewards
        self.transfer = replace(planned, drawn=[*planned.drawn, *begun])

    def _say_nothing_to_do(self) -> None:
        if self.world.is_main:
            show(nothing_to_do(self.config, self.progress.step), sys.stdout)

    # ---------------------------------------------------------------------------------------------- the trainer's parts

    @contextmanager
    def _parts(self, engine: Engine, stores: Stores, origin: Origin | None, stream: Stream) -> Iterator[Parts]:
        """Build the trainer's collaborators; afterwards stop the loader's thread and the timing of waits."""
        config, layout, world = self.config, self.layout, self.world
        micro_batch_size = config.train.micro_batch_size
        peak = peak_flops(world.device, config.precision.name)
        rollback = CheckpointRollback(
            *(world, engine, stores.disk, stores.memory, self.journal, stream, self._order),
            *(partial(batch_size, config.train), config.resilience.spike_skip_steps),
            *(max((override.step for override in self.overrides), default=0), self.early_stop_reset_at),
        )
        kept = {**self.compared.kept, **self.taught.kept}
        slow_ranks = SlowRankWatch(config, world, layout, self.journal)  # before waits are timed: it asks all ranks
        try:
            with self._clock() as clock:
                yield Parts(
                    engine=engine,
                    stream=stream,
                    heldout=self._heldout(),
                    store=Saver(stores.disk, config.checkpoint, stores.memory, self.on_gpu, self._show_wait),
                    journal=self.journal,
                    exchange=RankExchange(
                        world.all_gather,
                        layout.readers,
                        lambda hashes: step_hash(in_sample_order(hashes, micro_batch_size)),
                    ),
                    clock=clock,
                    stop=self.stop,
                    rollback=rollback,
                    slow_ranks=slow_ranks,
                    shares=self._shares,
                    identity=self._identity(origin),
                    tasks=self.tasks,
                    replies=heldout_replies(self.data, stream),
                    state=lambda step: engine.state() | stream.state(step) | kept,
                    throughput=Throughput(
                        flops_per_token(config.model, config.train.seq_len), peak * world.size if peak else None
                    ),
                )
        finally:
            stream.close()

    def _task_scores(self, engine: Engine) -> TaskScores | None:
        """Return what scores tasks during training, with their data; None without `train.tasks`."""
        if not scores_tasks(self.config):
            return None
        return TaskScores(self.config, self.world, engine, self.data.folder, self.run_dir, self.may_write)

    @cached_property
    def _order(self) -> Order:
        return self.data.order

    def _stream(self, engine: Engine, buffers: dict[str, Tensor]) -> Stream:
        """Return the stream of batches: `buffers` is what the checkpoint holds besides the engine's tensors."""
        config = self.config
        if self.judge:
            reference = self.compared.model
            return rollout_stream(
                self.data, engine, self.world, self.layout, self.progress, buffers, reference, self.judge
            )
        return TrainStream(
            self.data.train,
            self._order,
            vocab_size=config.model.vocab,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=self.layout.dp_rank(self.world.rank),
            dp_size=self.layout.dp,
            batch_size=partial(batch_size, config.train),
            first_step=self.progress.step + 1,
            cursor=self.progress.cursor,
            skip_ranges=self.progress.skip_ranges,
            end_of_document=self.data.end_of_document,
            reset_positions=config.train.reset_positions,
            pin_memory=self.on_gpu,
        )

    def _heldout(self) -> list[HeldoutShare]:
        """Return this rank's held-out shares. One set of weights for the whole run keeps their mean comparable.

        The weights are those of the first phase that reads a source with held-out data.
        """
        dp_rank, mixture = self.layout.dp_rank(self.world.rank), self.data.mixture
        weights: Mapping[str, float] = mixture.plan.first_weights(self.data.heldout) if mixture else {"": 1.0}
        if mixture and self.data.heldout and not weights:
            if self.world.is_main:
                _LOG.warning("no phase of data.mixture reads a source with held-out data, so nothing is evaluated")
            return []
        return [
            HeldoutShare(
                *(name, weights.get(name, 0), dataset, self.config, dp_rank, self.layout.dp, self.data.end_of_document)
            )
            for name, dataset in self.data.heldout.items()
        ]

    def _shares(self, progress: Progress) -> dict[str, Any]:
        """Return what the run has seen of each source of its mixture; empty for one dataset."""
        if self.data.mixture is None:
            return {}
        return seen_shares(self.data.mixture.plan, progress.cursor, progress.skip_ranges)

    @contextmanager
    def _clock(self) -> Iterator[Clock]:
        if self.on_gpu:  # waits on the device do not block the host, so there is nothing to time
            yield CudaClock(self.world.heartbeat)
            return
        with timed_waits(self.world.heartbeat.waited) as waits:
            yield HostClock(self.world.heartbeat, waits.held_up)

    def _profiler(self) -> Any:
        """Return the context that traces steps (`profile=true`)."""
        if not self.config.profile:
            return nullcontext()
        left = self.config.train.steps - self.progress.step
        if self.world.is_main and left < FIRST_TRACED:
            _LOG.warning(
                "profile=true begins with the %dth step of a start, and %d are left: give train.steps=%d or more",
                *(FIRST_TRACED, left, self.progress.step + FIRST_TRACED + ACTIVE - 1),
            )
        return profiled_steps(self.run_dir / "profile", self.world, print)

    # ---------------------------------------------------------------------------------------------- records

    def _identity(self, origin: Origin | None) -> Identity:
        judges = self.judge.lines if self.judge else []
        ancestors, parents = inherited_line(origin, str(self.config.run.name), self.taught.line, *judges)
        return Identity(
            config=asdict(self.config),
            dataset_fingerprint=self.data.fingerprint,
            layout=self.layout.to_dict(),
            engine=self.config.engine.name,
            origin=origin.began_from if origin else None,
            generation=inherited_generation(origin, self.config.checkpoint.override) if origin else {},
            overrides=self.overrides,
            mixture=self.data.mixture.plan if self.data.mixture else None,
            ancestors=ancestors,
            parents=parents,
            rewards=dict(self.judge.kept) if self.judge else {},
        )

    def _trackers(self) -> Trackers:
        """Return the console and the tracker that `tracking` names."""
        trackers: list[Tracker] = [Console(self.config.train.steps)]
        if self.config.tracking.name == "mlflow":
            trackers.append(MlflowTracker(self.config.tracking, self.run_dir, MLFLOW_HELPER))
        return Trackers(trackers)

    def _record_start(self, origin: Origin | None) -> None:
        resumes = origin is not None and origin.resumes
        info = RunInfo(
            run_name=str(self.config.run.name),
            run_dir=self.run_dir,
            config=asdict(self.config),
            resumed_from_step=self.progress.step if resumes else None,
            num_parameters=num_parameters(self.config.model),
            flops_per_token=flops_per_token(self.config.model, self.config.train.seq_len),
            world_size=self.world.size,
            device=str(self.world.device.type),
            layout=describe(self.config, self.layout),
            dataset=asdict(self.data.card),
            dataset_fingerprint=self.data.fingerprint,
            git_commit=git_commit(Path(__file__).parent),
            host=socket.gethostname(),
        )
        self.has_begun = True
        further: dict[str, Any] = {"restarts": self.restarts} if self.restarts else {}
        if origin and origin.node:
            further["copy"] = "in memory"
        self.journal.start(info, self.progress.step, **further)
        if self.preflight:
            self.journal.event("preflight", self.progress.step, **self.preflight)
        if self.world.is_main and (packings := self.data.packings):
            self.journal.event("packing", self.progress.step, packings=packings)
        if self.compared.detail:
            self.journal.event("reference", self.progress.step, **self.compared.detail)
        if self.taught.detail:
            self.journal.event("teacher", self.progress.step, **self.taught.detail)
        chosen = {override.key for override in self.overrides if override.step == self.progress.step}
        for key, (before, now) in self.changes.items():
            detail = {"key": key, "before": before, "now": now, "override": key in chosen}
            self.journal.event("change", self.progress.step, **detail)
        if origin and self.transfer:
            self.journal.event("init_from", 0, checkpoint=str(origin.folder), **self.transfer.describe())

    def _record_failure(self, error: BaseException) -> None:
        """Record the error that ended this rank, unless the agent is to decide whether the run goes on."""
        step, kind = self.progress.step, classify(error)
        if kind == PEER:
            self.journal.event("lost_rank", step)
        if self.has_begun and not (kind != USER and self.world.heartbeat.has_agent):
            self.journal.finish("failed", step, error=f"{type(error).__name__}: {message_of(error)}")
        else:
            self.journal.abandon()

    def _show_wait(self, seconds: float) -> None:
        """Show that training waits for a save."""
        self.journal.progress(self.progress.step, f"writing a checkpoint: {seconds:.0f} s so far")

    def _peak_memory(self) -> dict[str, int]:
        """Return the peak bytes of this rank's tensors on its GPU; empty on a CPU."""
        return {"peak_device_bytes": torch.cuda.max_memory_allocated(self.world.device)} if self.on_gpu else {}

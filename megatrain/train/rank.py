"""One rank of a training job, from the checked config to an exit code: puts the rooms together and lets the trainer run.

How ranks are started is `local.py`'s; nothing here decides about restarts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml

from megatrain.checkpoint.memory_store import MemoryStore
from megatrain.checkpoint.resume import check_resume
from megatrain.checkpoint.saver import Saver
from megatrain.checkpoint.store import CheckpointStore
from megatrain.config import LaunchConfig, TrainConfig
from megatrain.config.flatten import flatten
from megatrain.data.batch import MicroBatch
from megatrain.data.card import Card
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import TrainStream, heldout_batches, in_sample_order, step_hash
from megatrain.data.order import SampleOrder, merge_ranges
from megatrain.distributed.devices import peak_flops
from megatrain.distributed.rank_environment import RankEnvironment, was_requeued
from megatrain.distributed.waits import timed_waits
from megatrain.distributed.world import World, join, leave, lost_peer
from megatrain.engine.build import build_engine
from megatrain.engine.protocol import Engine, stamp
from megatrain.errors import (
    EXIT_OK,
    EXIT_SAVED_AFTER_SIGNAL,
    ConfigError,
    DataError,
    EnvironmentFault,
    OwnedError,
    cannot_write,
)
from megatrain.model.count import flops_per_token, num_parameters
from megatrain.optim.schedule import batch_size
from megatrain.parallel import rules
from megatrain.parallel.layout import Layout, describe
from megatrain.resilience.heartbeat import Heartbeat
from megatrain.resilience.owner import Ownership
from megatrain.resilience.signals import StopRequest
from megatrain.resilience.stragglers import Stragglers
from megatrain.resilience.watchdog import answer_with_stacks, stack_file
from megatrain.tracking.console import Console
from megatrain.tracking.journal import Journal
from megatrain.tracking.mlflow import MlflowTracker
from megatrain.tracking.profile import ACTIVE, FIRST_TRACED, profiled_steps
from megatrain.tracking.tracker import RunInfo, Trackers, git_commit
from megatrain.train.origin import Origin, choose_origin, copy_in_memory, load_origin
from megatrain.train.preflight import preflight
from megatrain.train.rollback import Rollback
from megatrain.train.trainer import Parts, Progress, Trainer

BY_HOST = ("launch.", "data.dir", "data.workers", "run.dir", "engine.nvme_path")
"""Keys that may differ between the ranks of a job."""

_LOG = logging.getLogger("megatrain")


def run(config: TrainConfig) -> int:
    """Train on this rank; returns 0 when the run is done and 75 when it saved after a signal.

    Raises:
        MegatrainError: a user's mistake or a fault of the machine, before anything is damaged.
    """
    stop = StopRequest()
    stop.listen()
    # DeepSpeed still calls collectives by names that torch is renaming; its users cannot act on the warning
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    environment = RankEnvironment.from_environ()
    heartbeat = Heartbeat.from_environ(environment.local_rank)
    rules.check(config, environment.world_size)
    with (
        log_to(run_folder(config), environment.rank),
        answer_with_stacks(stack_file(run_folder(config), environment.rank)),
    ):
        warn_of_other_count(config, environment)
        data = open_data(config)
        rules.check(data.config, environment.world_size)  # again, now that the vocabulary is known
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        world = join(config.launch, environment, heartbeat)
        check_agreement(config, data, world)
        with ownership(run_folder(config), world) as owner:
            ready = None
            if config.launch.preflight and not environment.restarts:
                ready = preflight(data.config, run_folder(config), world)
            status = work(data, world, stop, owner, environment.restarts, ready)
        leave()  # not after a failure: its message comes first, and taking NCCL down without a peer can block
    return EXIT_OK if status == "done" else EXIT_SAVED_AFTER_SIGNAL


def check_agreement(config: TrainConfig, data: OpenData, world: World) -> None:
    """Refuse ranks that were started with other configs or see other data: they would train different models in part.

    What may differ by host is left out: `launch` and where folders are.

    Raises:
        ConfigError: on every rank, naming the ranks and the first keys that differ from rank 0's.
    """
    mine = {key: value for key, value in flatten(asdict(config)).items() if not key.startswith(BY_HOST)}
    mine["data (fingerprint)"] = data.fingerprint
    fingerprint = xxhash.xxh3_64_hexdigest(json.dumps(mine, sort_keys=True, default=str).encode())
    if len(set(world.all_gather_json(fingerprint))) == 1:
        return
    everyone = world.all_gather_json(mine)
    told = []
    for rank, other in enumerate(everyone):
        differing = [key for key in {**everyone[0], **other} if other.get(key) != everyone[0].get(key)]
        told += [f"rank {rank} has {key}={other.get(key)}, rank 0 {everyone[0].get(key)}" for key in differing[:3]]
    raise ConfigError(
        f"the ranks disagree on the config: {'; '.join(told[:8])}. Start all of them with the same command"
    )


@contextmanager
def ownership(run_dir: Path, world: World) -> Iterator[Ownership | None]:
    """The right to write to the run's folder, on rank 0: its agent's, or where another launcher started the ranks, taken
    here.

    Raises:
        OwnedError: on every rank, if another job owns the folder.
    """
    owner, refusal, taken = None, "", False
    if world.is_main:
        owner = Ownership.from_environ(run_dir)
        try:
            if owner is None:
                owner, taken = Ownership.take(run_dir), True
        except OwnedError as error:
            refusal = str(error)
    if refusal := world.all_gather_json(refusal)[0]:
        raise OwnedError(refusal)
    try:
        yield owner
    finally:
        if owner is not None and taken:
            owner.release()


def work(
    data: OpenData,
    world: World,
    stop: StopRequest,
    owner: Ownership | None,
    restarts: int,
    ready: dict[str, Any] | None,
) -> str:
    """Find where the run stands, build the engine and train; returns `done` or `stopped`. `ready` is what was measured
    before."""
    config = data.config
    run_dir = run_folder(config)
    layout = Layout.of(config, world.size)
    may_write = owner.check if owner else lambda: None
    trackers = build_trackers(config, run_dir) if world.is_main else None
    journal = Journal(run_dir if world.is_main else None, trackers, may_write)
    began = False
    progress = Progress(skip_ranges=merge_ranges((start, stop) for start, stop in config.train.skip_ranges))
    try:
        store = CheckpointStore(
            run_dir / "checkpoints",
            world,
            lambda kind, **detail: journal.event(kind, progress.step, **detail),
            may_write,
        )
        copies_every = config.checkpoint.copies_every(world.device.type == "cuda")
        memory = MemoryStore.from_environ(world) if copies_every else None
        if config.checkpoint.memory_every and memory is None and world.is_main:
            _LOG.warning("checkpoint.memory_every is for ranks that megatrain itself started; no copies are made")
        origin = copy_in_memory(store, memory) if memory else None
        origin = origin or choose_origin(config, store, restarted=restarts > 0 or was_requeued())
        resumed = origin.resumes if origin else False
        if origin and resumed:
            changed = check_resume(origin.manifest, asdict(config), data.fingerprint, str(origin.folder))
            progress = Progress.from_manifest(origin.manifest)
            for key, (before, now) in changed.items():
                level = logging.WARNING if key.startswith("precision.") and world.is_main else logging.INFO
                _LOG.log(level, "resume: %s was %s in %s and is now %s", key, before, origin.folder, now)
        if resumed and progress.step >= config.train.steps:
            if world.is_main:
                print(
                    f"run {config.run.name} is at step {progress.step} of train.steps={config.train.steps}: nothing to "
                    f"do. Raise train.steps to go on, or take another run.name"
                )
            return "done"
        engine = build_engine(config, world)
        if origin:
            world.heartbeat.enter("load")
            load_origin(origin, engine, world)
        if resumed:
            store.set_aside(progress.step)
        if world.is_main:
            write_run_folder(run_dir, config, data)
        info = run_info(config, run_dir, data, world, layout, progress.step if resumed else None)
        began = True
        told = {"restarts": restarts} if restarts else {}
        journal.start(info, progress.step, **told, **({"copy": "in memory"} if origin and origin.node else {}))
        if ready:
            journal.event("preflight", progress.step, **ready)
        if origin and not resumed:
            journal.event("init_from", 0, checkpoint=str(origin.folder))
        status = train(config, world, layout, engine, store, memory, journal, data, progress, origin, stop)
    except BaseException as error:
        if lost_peer(error):
            _LOG.info("lost another rank", exc_info=error)
            journal.event("lost_rank", progress.step)
            journal.abandon()
            raise EnvironmentFault(
                f"rank {world.rank} lost another rank, which ended or is out of reach; the other ranks' logs tell why"
            ) from error
        if began:
            journal.finish("failed", progress.step, error=f"{type(error).__name__}: {error}")
        else:
            journal.abandon()
        raise
    journal.finish(status, progress.step, **peak_memory(world))
    return status


def peak_memory(world: World) -> dict[str, int]:
    """The most bytes that this rank's tensors took of its GPU at once; nothing where there is none."""
    if world.device.type != "cuda":
        return {}
    return {"peak_device_bytes": torch.cuda.max_memory_allocated(world.device)}


def train(
    config: TrainConfig,
    world: World,
    layout: Layout,
    engine: Engine,
    store: CheckpointStore,
    memory: MemoryStore | None,
    journal: Journal,
    data: OpenData,
    progress: Progress,
    origin: Origin | None,
    stop: StopRequest,
) -> str:
    """Make the stream of batches and run the trainer over it; returns the trainer's verdict."""
    order = SampleOrder(data.fingerprint, "train", config.train.seq_len, data.train.num_tokens, config.seed)

    def samples(step: int) -> int:
        return batch_size(config.train, step)

    stream = TrainStream(
        data.train,
        order,
        seq_len=config.train.seq_len,
        vocab_size=config.model.vocab,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=layout.dp_rank(world.rank),
        dp_size=layout.dp,
        batch_size=samples,
        first_step=progress.step + 1,
        cursor=progress.cursor,
        skip_ranges=progress.skip_ranges,
        end_of_document=data.end_of_document,
        pin_memory=world.device.type == "cuda",
    )
    peak = peak_flops(world.device, config.precision.name)
    parts = Parts(
        engine=engine,
        stream=stream,
        heldout=heldout_reader(config, world, layout, data),
        store=Saver(store, config.checkpoint, memory),
        journal=journal,
        exchange=world.all_gather,
        batch_hash=lambda hashes: step_hash(in_sample_order(hashes[layout.readers], config.train.micro_batch_size)),
        copies_every=config.checkpoint.copies_every(world.device.type == "cuda") if memory else 0,
        stopping=lambda: stop.signal_number,
        mark=world.heartbeat.enter,
        compare=compare_ranks(config, world, layout, journal),
        roll_back=Rollback(
            world, engine, store, memory, journal, stream, order, samples, config.resilience.spike_skip_steps
        ),
        identity={
            "config": asdict(config),
            "dataset_fingerprint": data.fingerprint,
            "layout": layout.to_dict(),
            "engine": config.engine.name,
            "origin": origin.began_from if origin else None,
        },
        flops_per_token=flops_per_token(config.model, config.train.seq_len),
        peak_flops=peak * world.size if peak else None,
        bytes_per_token=data.heldout_bytes_per_token,
        reads_late=world.device.type == "cuda",
        stamp=stamp if world.device.type == "cuda" else lambda: None,
    )
    on_disk = origin is None or origin.node is None
    traced = profiled_steps(run_folder(config) / "profile", world, print) if config.profile else nullcontext()
    if config.profile and world.is_main and config.train.steps - progress.step < FIRST_TRACED:
        _LOG.warning(
            "profile=true begins with the %dth step of a start, and %d are left: give train.steps=%d or more",
            *(FIRST_TRACED, config.train.steps - progress.step, progress.step + FIRST_TRACED + ACTIVE - 1),
        )
    try:
        with traced:
            if world.device.type != "cpu":  # where a wait blocks nobody, there is nothing to time
                return Trainer(config, parts, progress, on_disk).run()
            with timed_waits(world.heartbeat.waited) as waits:
                return Trainer(config, replace(parts, held_up=waits.held_up), progress, on_disk).run()
    finally:
        stream.close()


def compare_ranks(
    config: TrainConfig, world: World, layout: Layout, journal: Journal
) -> Callable[[int, list[float]], None]:
    """What takes every rank's own seconds of a step, and on the main rank says who is slow."""
    hosts = world.all_gather_json(socket.gethostname())
    if not (world.is_main and world.size > 1 and config.resilience.slow_rank_ratio):
        return lambda step, own_times: None
    stages = [layout.coordinate(rank).pp for rank in range(world.size)]
    stragglers = Stragglers(stages, config.resilience.slow_rank_ratio)

    def compare(step: int, own_times: list[float]) -> None:
        for found in stragglers.judge(own_times):
            detail = {"rank": found.rank, "host": hosts[found.rank], "ratio": round(found.ratio, 3)}
            detail |= {"own_s": found.own_s, "others_s": found.others_s}
            journal.event("slow_rank" if found.is_slow else "slow_rank_over", step, **detail)
            who = f"rank {found.rank} on {hosts[found.rank]}"
            if not found.is_slow:
                _LOG.warning("%s is as fast as the others again (step %d)", who, step)
                continue
            _LOG.warning(
                "%s is slow, and all others wait for it: %.3g s of its own a step, %.2f times the %.3g s of its like (step %d)",
                who, found.own_s, found.ratio, found.others_s, step,
            )  # fmt: skip

    return compare


# ---------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class OpenData:
    """A run's dataset, opened and compared with the model; `config` has the vocabulary filled in."""

    config: TrainConfig
    folder: Path
    card: Card
    train: IndexedDataset
    heldout: IndexedDataset | None

    @property
    def fingerprint(self) -> str:
        """The dataset's identity."""
        return self.card.fingerprint

    @property
    def end_of_document(self) -> int | None:
        """The token that ends a document, where the run keeps documents apart."""
        if not self.config.train.mask_documents:
            return None
        assert self.card.tokenizer is not None, "checks.py asked for it"
        return self.card.tokenizer.end_of_document

    @property
    def heldout_bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes of a held-out token, for bits per byte; None where the text's size is unknown."""
        card = self.heldout.split_card if self.heldout else None
        return card.bytes / card.tokens if card and card.bytes and card.tokens else None


def open_data(config: TrainConfig) -> OpenData:
    """Open the dataset of a run and fill in the model's vocabulary.

    Raises:
        DataError: a damaged dataset, or too few tokens for one sample.
        ConfigError: a tokenizer whose vocabulary exceeds the model's, evaluation without held-out data, or documents that are
            to be kept apart and do not end with the tokenizer's token.
    """
    folder = Path(config.data.dir) / config.data.name
    train = IndexedDataset.open(folder, "train", config.data.verify)
    card = train.card
    vocab = card.tokenizer.vocab_size if card.tokenizer else None
    if config.model.vocab_size is None:
        if vocab is None:
            raise ConfigError(
                f"model.vocab_size is null and {folder} names no tokenizer to take it from; set model.vocab_size"
            )
        config = replace(config, model=replace(config.model, vocab_size=vocab))
    elif vocab is not None and vocab > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary of {folder}'s tokenizer, {vocab}; "
            f"set model.vocab_size={vocab} (or null) or prepare the data with another tokenizer"
        )
    if train.num_tokens <= config.train.seq_len:
        raise DataError(
            f"{folder}/train.bin holds {train.num_tokens} tokens, one sample of train.seq_len={config.train.seq_len} needs "
            f"{config.train.seq_len + 1}; use a smaller train.seq_len or more data"
        )
    heldout = None
    if "heldout" in card.splits and card.splits["heldout"].tokens > 1:
        heldout = IndexedDataset.open(folder, "heldout", config.data.verify)
    elif config.train.eval_every:
        raise ConfigError(
            f"train.eval_every={config.train.eval_every}, but {folder} has no held-out split; prepare it with "
            f"data.heldout_fraction above 0 or set train.eval_every=0"
        )
    data = OpenData(config, folder, card, train, heldout)
    end = data.end_of_document
    if end is not None and (last := next(ids for ids in train.documents() if len(ids))[-1]) != end:
        raise ConfigError(
            f"train.mask_documents=true: documents end where token {end} stands, that of {folder}'s tokenizer, but "
            f"its first document ends with {last}; name the tokenizer that made the data when preparing it, make the data "
            f"with end-of-document tokens (Megatron-LM: --append-eod), or set train.mask_documents=false"
        )
    return data


def heldout_reader(
    config: TrainConfig, world: World, layout: Layout, data: OpenData
) -> Callable[[], Iterable[MicroBatch]] | None:
    """What gives this rank's held-out batches, from the first on, each time it is called."""
    heldout = data.heldout
    if heldout is None:
        return None
    steps = config.train.eval_steps
    return lambda: heldout_batches(
        heldout,
        seq_len=config.train.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=layout.dp_rank(world.rank),
        dp_size=layout.dp,
        max_samples=steps * config.train.global_batch_size if steps else None,
        vocab_size=config.model.vocab,
        end_of_document=data.end_of_document,
    )


# ---------------------------------------------------------------------------------------------------- the run's folder


def run_folder(config: TrainConfig) -> Path:
    """Where a run lives."""
    return Path(config.run.dir) / str(config.run.name)


class Warnings(logging.Handler):
    """Shows warnings on the terminal, one line each; their stack traces are in the log file."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Looks sys.stderr up each time: the progress bar puts itself in its place."""
        print(f"megatrain: {record.levelname.lower()}: {record.getMessage()}", file=sys.stderr, flush=True)


@contextmanager
def log_to(run_dir: Path, rank: int) -> Iterator[None]:
    """Send this rank's log records to logs/rank_00000.log, and rank 0's warnings to the terminal too.

    Raises:
        ConfigError, EnvironmentFault: the folder cannot be written.
    """
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(run_dir / "logs" / f"rank_{rank:05d}.log")
    except OSError as error:
        raise cannot_write(run_dir, error) from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers = [file, Warnings()] if rank == 0 else [file]
    level, propagate = _LOG.level, _LOG.propagate
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False  # or a library that sets up the root logger would show each warning again
    for handler in handlers:
        _LOG.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            _LOG.removeHandler(handler)
            handler.close()
        _LOG.setLevel(level)
        _LOG.propagate = propagate


def warn_of_other_count(config: TrainConfig, environment: RankEnvironment) -> None:
    """Say that another launcher's number of processes counts, where `launch.nproc_per_node` names another."""
    asked, found = config.launch.nproc_per_node, environment.local_world_size
    if asked not in (found, LaunchConfig().nproc_per_node):
        _LOG.warning(
            "launch.nproc_per_node=%d is not what counts here: the launcher started %d processes on this node",
            asked,
            found,
        )


def write_run_folder(run_dir: Path, config: TrainConfig, data: OpenData) -> None:
    """The resolved config and the tokenizer, so that the folder can be understood without the dataset."""
    temporary = run_dir / "config.yaml.tmp"
    temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
    os.replace(temporary, run_dir / "config.yaml")
    source, target = data.folder / "tokenizer", run_dir / "tokenizer"
    if source.is_dir() and not target.exists():
        copying = run_dir / "tokenizer.tmp"
        shutil.rmtree(copying, ignore_errors=True)
        shutil.copytree(source, copying)
        os.replace(copying, target)


def build_trackers(config: TrainConfig, run_dir: Path) -> Trackers:
    """The console and the tracker that `tracking` names."""
    trackers: list[Any] = [Console(config.train.steps)]
    if config.tracking.name == "mlflow":
        trackers.append(MlflowTracker(config.tracking, run_dir, "megatrain.train.mlflow_helper"))
    return Trackers(trackers)


def run_info(
    config: TrainConfig,
    run_dir: Path,
    data: OpenData,
    world: World,
    layout: Layout,
    resumed_from_step: int | None,
) -> RunInfo:
    """What trackers are told once."""
    return RunInfo(
        run_name=str(config.run.name),
        run_dir=run_dir,
        config=asdict(config),
        resumed_from_step=resumed_from_step,
        num_parameters=num_parameters(config.model),
        flops_per_token=flops_per_token(config.model, config.train.seq_len),
        world_size=world.size,
        device=str(world.device.type),
        layout=describe(config, layout),
        dataset=asdict(data.card),
        dataset_fingerprint=data.fingerprint,
        git_commit=git_commit(Path(__file__).parent),
        host=socket.gethostname(),
    )

"""Run one rank of a training job, from the checked config to an exit code.

This module opens the data, joins the other ranks and takes ownership of the run's folder; `job.py` does the rest. The
agent (`launch/agent.py`) starts and restarts ranks.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatrain.config import LaunchConfig, TrainConfig
from megatrain.distributed.rank_environment import RankEnvironment
from megatrain.distributed.world import StoppedWhileJoining, World, join, leave
from megatrain.errors import (
    EXIT_DEFECT,
    EXIT_ENVIRONMENT,
    EXIT_OK,
    EXIT_SAVED_AFTER_SIGNAL,
    EnvironmentFault,
    LostPeerError,
    OwnedError,
)
from megatrain.parallel import rules
from megatrain.resilience.fault_classes import JOB, PEER, USER, ErrorReport
from megatrain.resilience.heartbeat import Heartbeat
from megatrain.resilience.owner import Ownership
from megatrain.resilience.signals import StopRequest
from megatrain.resilience.terminal import say
from megatrain.resilience.watchdog import answer_with_stacks, stack_file
from megatrain.training.agreement import check_agreement
from megatrain.training.datasets import open_data
from megatrain.training.job import RankJob
from megatrain.training.preflight import preflight
from megatrain.training.run_folder import log_to, run_folder

_LOG = logging.getLogger("megatrain")


def run(config: TrainConfig) -> int:
    """Train on this rank; return 0 if the run is done, 75 if it was saved after a signal.

    Raises:
        MegatrainError: a user's mistake or a fault of the machine.
    """
    stop = StopRequest()
    stop.listen()
    # DeepSpeed calls collectives by names that torch is renaming; users cannot act on the warning.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    environment = RankEnvironment.from_environ()
    heartbeat = Heartbeat.from_environ(environment.local_rank)
    stop.asked_by = lambda: heartbeat.asked_by
    rules.check(config, environment.world_size)
    run_dir = run_folder(config)
    with log_to(run_dir, environment.rank), answer_with_stacks(stack_file(run_dir, environment.rank)):
        try:
            code = _train(config, environment, heartbeat, stop)
        except StoppedWhileJoining:
            if environment.rank == 0:
                say("stopped before training began; start again to continue")
            code = EXIT_SAVED_AFTER_SIGNAL
        except BaseException as error:  # SystemExit too: only what ends this function may end the rank
            return _report(error, environment, heartbeat)
        heartbeat.end(code)
        return code


def _report(error: BaseException, environment: RankEnvironment, heartbeat: Heartbeat) -> int:
    """Leave a report of the error for the agent, which decides what becomes of the job; return this rank's exit code.

    Raises:
        MegatrainError: a user's mistake; or there is no agent, and the machine is to blame.
        Exception: there is no agent, and the job is to blame.
    """
    report = ErrorReport.of(error)
    heartbeat.report(report.to_json())
    if report.kind == USER:
        raise error
    _LOG.info("rank %d ends, class of the error: %s", environment.rank, report.kind, exc_info=error)
    if heartbeat.has_agent:
        return EXIT_DEFECT if report.kind == JOB else EXIT_ENVIRONMENT
    if report.kind == JOB:
        if isinstance(error, Exception):
            raise error
        # SystemExit(0) is no success.
        raise RuntimeError(f"rank {environment.rank} was ended in the middle of the run by {report}") from error
    if report.kind == PEER:
        raise LostPeerError(
            f"rank {environment.rank} lost another rank, which ended or is out of reach; the other ranks' logs say why"
        ) from error
    raise EnvironmentFault(f"rank {environment.rank} on {socket.gethostname()}: {report}") from error


def _train(config: TrainConfig, environment: RankEnvironment, heartbeat: Heartbeat, stop: StopRequest) -> int:
    """Open the data, join the other ranks and train; return 0 or 75."""
    run_dir = run_folder(config)
    _warn_of_other_count(config, environment)
    data = open_data(config)
    rules.check(data.config, environment.world_size)  # again, now that the vocabulary is known
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    world = join(config.launch, environment, heartbeat, lambda: bool(stop))
    check_agreement(config, data.fingerprint, world)
    with _ownership(run_dir, world) as owner:
        measured = None
        if config.launch.preflight and not environment.restarts:
            measured = preflight(data.config, run_dir, world)
        status = RankJob(data, world, stop, owner, environment.restarts, measured).run()
    leave()  # not after a failure: its message must come first, and destroying NCCL after losing a peer can block
    return EXIT_OK if status == "done" else EXIT_SAVED_AFTER_SIGNAL


@contextmanager
def _ownership(run_dir: Path, world: World) -> Iterator[Ownership | None]:
    """Hold, on rank 0, the right to write to the run's folder.

    The agent already holds it; under another launcher it is taken here.

    Raises:
        OwnedError: on every rank, if another job owns the folder.
    """
    owner, refusal, is_taken_here = None, "", False
    if world.is_main:
        owner = Ownership.from_environ(run_dir)
        try:
            if owner is None:
                owner, is_taken_here = Ownership.take(run_dir), True
        except OwnedError as error:
            refusal = str(error)
    if refusal := world.all_gather_json(refusal)[0]:
        raise OwnedError(refusal)
    try:
        yield owner
    finally:
        if owner is not None and is_taken_here:
            owner.release()


def _warn_of_other_count(config: TrainConfig, environment: RankEnvironment) -> None:
    """Warn if another launcher started a different number of processes than `launch.nproc_per_node` asks for."""
    asked, found = config.launch.nproc_per_node, environment.local_world_size
    if asked not in (found, LaunchConfig().nproc_per_node):
        _LOG.warning(
            "launch.nproc_per_node=%d has no effect here: the launcher started %d processes on this node", asked, found
        )

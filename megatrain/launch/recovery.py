"""Recovery from failures: record them, decide on a restart, save the in-memory copies. Imports no torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.checkpoint.naming import checkpoint_step
from megatrain.checkpoint.rescue import RESCUED, Copies, assemble
from megatrain.errors import EXIT_DEFECT, EXIT_ENVIRONMENT, EXIT_NO_PROGRESS, OwnedError
from megatrain.launch.rank_process import log_name
from megatrain.resilience.failure import (
    HANG,
    MEMORY_FAILURES,
    SAME_FAILURES,
    Failure,
    failed_alike_before_any_step,
    suspects,
    times_seen,
)
from megatrain.resilience.fault_classes import JOB, MACHINE, MEMORY, PEER
from megatrain.resilience.owner import Ownership
from megatrain.resilience.terminal import say
from megatrain.resilience.watchdog import Limits, Witness, culprits
from megatrain.tracking.events import EventLog, read_events
from megatrain.tracking.metrics import now

EVENTS = "events.jsonl"

MACHINES = (MACHINE, PEER)
"""Classes of errors after which the machine, not the job, is to blame."""

MEMORY_ADVICE = (
    "lower train.micro_batch_size, set train.recompute=selective or full, raise parallel.zero, or use more ranks "
    "(megatrain layouts shows what a rank needs)"
)


FEW_S = 60.0
"""Seconds below which `resilience.hang_timeout_s` may be shorter than a step, an evaluation or a save."""


@dataclass(frozen=True)
class Recovery:
    """How an agent handles worker failures in the run in `run_dir`, which it owns."""

    run_dir: Path
    owner: Ownership
    max_restarts: int
    max_machine_restarts: int
    limits: Limits
    copies: bool = False
    """Whether the ranks keep copies of their state in this agent's memory."""
    modules: Sequence[str] = ()
    """Modules that the workers import. A fork server imports them once where the system supports it."""
    can_move: bool = False
    """Whether the job can continue on other nodes: Slurm requeues it."""
    since: float | None = None
    """When the agent started, for the ledger (time.monotonic(); None means now)."""


@dataclass
class Restarts:
    """How often an agent has restarted its ranks: in all, and after faults of the machine since the run last got on.

    The run got on if a start continued from a later step than every start before it.
    """

    total: int = 0
    machine: int = 0
    furthest: int = 0

    def began_at(self, step: int) -> None:
        """Note the first step of the start that just ended (0: it began none)."""
        if step > self.furthest:
            self.furthest, self.machine = step, 0

    def count(self, failure: Failure) -> None:
        """Count a restart after this failure."""
        self.total += 1
        self.machine += failure.kind in MACHINES


def decide_restart(
    failure: Failure, recovery: Recovery, restarts: Restarts, stop_requested: bool, log_dir: Path
) -> int | None:
    """Record a failure, and return the exit code that ends the job, or None to restart all ranks.

    `log_dir` holds the ranks' logs.
    """
    try:
        events = read_events(recovery.run_dir / EVENTS)
    except OSError:  # no events yet, or the disk is unavailable
        events = []
    seen = times_seen(failure, events)
    record_event(recovery.run_dir, "failure", failure.step, **failure.event(), times=seen)
    of_machine = failure.kind in MACHINES
    limit, count = recovery.max_restarts, restarts.total
    if of_machine:
        limit, count = recovery.max_machine_restarts, restarts.machine
    own_code = EXIT_ENVIRONMENT if of_machine or failure.kind == HANG else EXIT_DEFECT
    own_code = EXIT_NO_PROGRESS if failure.kind == MEMORY else own_code
    before = failed_alike_before_any_step(failure, events) if failure.kind == JOB else None
    bad_hosts = suspects([failure.host], [*events, _as_event(failure)], time.time()) if failure.kind == MACHINE else []
    hint = _log_hint(log_dir, failure)
    if failure.kind == HANG and (limit_s := recovery.limits.training_s) < FEW_S:
        print_message(f"resilience.hang_timeout_s={limit_s:g} counts a step that lasts longer as a hang; raise it")

    code, decision = None, f"starting all ranks again (restart {count + 1} of {limit})"
    if stop_requested:
        code = EXIT_DEFECT if failure.kind == JOB else EXIT_ENVIRONMENT
        decision = "not started again, because the job was asked to stop"
    elif failure.kind == MEMORY and seen >= MEMORY_FAILURES:
        code, decision = EXIT_NO_PROGRESS, f"also after a fresh start; not started again: {MEMORY_ADVICE}. {hint}"
    elif seen >= SAME_FAILURES and (failure.step or not of_machine):
        code, decision = EXIT_NO_PROGRESS, f"the same {seen} times in a row; not started again. {hint}"
    elif before is not None:
        code, decision = EXIT_DEFECT, "the same on two starts before any step was done; not started again"
        print_message(f"the first start ended with:\n{before.get('trace', '')}")
    elif bad_hosts and recovery.can_move:
        code = EXIT_ENVIRONMENT
        decision = f"{failure.host} had a fault of the machine before; the job is to go on without that node"
    elif count >= limit:
        key = "resilience.max_machine_restarts" if of_machine else "resilience.max_restarts"
        advice = f": {MEMORY_ADVICE}" if failure.kind == MEMORY else ""
        code, decision = own_code, f"not started again ({key}={limit}){advice}. {hint}"
    print_message(f"{failure}; {decision}")
    if bad_hosts:
        print_message(f"{failure.host} has had faults of the machine more than once in a day: have it checked")
    if code is None:
        restarts.count(failure)
        record_event(recovery.run_dir, "restart", failure.step, restarts=restarts.total)
    elif failure.trace and failure.kind != MEMORY:  # where memory ran out says little; the rank's log has the trace
        print_message(f"the stack trace of rank {failure.rank}:\n{failure.trace}")
        if failure.kind == JOB:
            print_message("this is a defect of megatrain; please report it with the lines above")
    return code


def _as_event(failure: Failure) -> dict[str, Any]:
    return {"time": now(), "kind": "failure", **failure.event()}


def _log_hint(log_dir: Path, failure: Failure) -> str:
    return f"Its log is {log_dir / log_name(failure.rank)}"


def report_hang(witnesses: Sequence[Witness], hosts: Sequence[str], run_dir: Path) -> Failure:
    """Record what every rank of a hung job was doing, and return the failure, which names the rank to blame.

    `hosts` holds each rank's host, by rank.
    """
    guilty = culprits(witnesses)
    first = guilty[0] if guilty else witnesses[0]
    for witness in witnesses:
        where = {"guilty": witness in guilty, "host": hosts[witness.rank]}
        record_event(run_dir, "hang", witness.beat.step, **witness.event(), **where)
    silent_s = min(witness.beat.age_s for witness in witnesses)
    others = "; ".join(str(witness) for witness in witnesses if witness is not first)
    detail = f"no rank has moved for {silent_s:.1f} s; {first}{f'; {others}' if others else ''}"
    if not guilty:
        detail += "; all ranks wait alike, so the network is the likely culprit"
    step = min(witness.beat.step for witness in witnesses)
    return Failure(HANG, first.rank, step, first.beat.phase, hosts[first.rank], detail, kind=HANG)


def save_copies(copies: Copies, recovery: Recovery, alone: bool) -> None:
    """Write the in-memory copies to disk if they are newer than the last checkpoint.

    `alone` means that another node's agent is gone: the copies become a checkpoint only at the next start.
    """
    checkpoints = recovery.run_dir / "checkpoints"
    with _report_failure("the copies in memory could not be written to disk"):
        recovery.owner.check()
        steps = copies.rescue(checkpoints, alone=alone)
        if alone and steps:
            numbers = ", ".join(map(str, steps))
            print_message(f"wrote the copies in memory of step {numbers} to {checkpoints / RESCUED}")


def assemble_copies(recovery: Recovery) -> None:
    """Assemble the copies that all nodes have written to disk into a checkpoint. Only node 0 calls this."""
    checkpoints = recovery.run_dir / "checkpoints"
    with _report_failure("the copies in memory could not be made a checkpoint"):
        recovery.owner.check()  # again, because writing the copies may have taken long
        made, problems = assemble(checkpoints)
        for problem in problems:
            print_message(problem)
        if made is not None:
            print_message(f"made {made} from the copies in memory; the next start continues from it")
            record_event(recovery.run_dir, "rescue", checkpoint_step(made) or 0, checkpoint=str(made))


@contextlib.contextmanager
def _report_failure(what: str) -> Iterator[None]:
    """Print a disk error or the loss of ownership instead of raising it."""
    try:
        yield
    except (OSError, OwnedError) as error:
        print_message(f"{what}: {error}; the next start continues from the last checkpoint")


def record_event(run_dir: Path, kind: str, step: int, **detail: Any) -> None:
    """Append to events.jsonl. A disk error is only printed: the agent, which holds the in-memory copies, must go on."""
    try:
        events = EventLog(run_dir / EVENTS)
        try:
            events.emit(kind, step, **detail)
        finally:
            events.close()
    except OSError as error:
        print_message(f"{run_dir / EVENTS} cannot be written ({error.strerror}); it lacks: {kind} at step {step}")


def print_message(message: str) -> None:
    """Print one line from the agent to the terminal."""
    say(message)

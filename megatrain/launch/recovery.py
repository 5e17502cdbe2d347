"""Recovery from failures: record them, decide on a restart, save the in-memory copies. Imports no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.checkpoint.naming import checkpoint_step
from megatrain.checkpoint.rescue import RESCUED, Copies, assemble
from megatrain.errors import EXIT_DEFECT, EXIT_NO_PROGRESS, EnvironmentFault, OwnedError
from megatrain.launch.rank_process import log_of
from megatrain.resilience.failure import SAME_FAILURES, Failure, times_seen
from megatrain.resilience.owner import Ownership
from megatrain.resilience.terminal import say
from megatrain.resilience.watchdog import Limits, Witness, culprits
from megatrain.tracking.events import EventLog, read_events

EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Recovery:
    """How an agent handles worker failures in the run in `run_dir`, which it owns."""

    run_dir: Path
    owner: Ownership
    max_restarts: int
    limits: Limits
    copies: bool = False
    """Whether the ranks keep copies of their state in this agent's memory."""
    modules: Sequence[str] = ()
    """Modules that the workers import. A fork server imports them once where the system supports it."""
    since: float | None = None
    """When the agent started, for the ledger (time.monotonic(); None means now)."""


def decide_restart(
    failure: Failure, recovery: Recovery, restarts: int, stop_requested: bool, log_dir: Path
) -> int | None:
    """Record a failure, and return the exit code that ends the job, or None to restart all ranks.

    `restarts` is how often this agent has restarted its ranks so far; `log_dir` holds the ranks' logs.
    """
    try:
        seen = times_seen(failure, read_events(recovery.run_dir / EVENTS))
    except OSError:  # no events yet, or the disk is unavailable
        seen = 1
    record_event(recovery.run_dir, "failure", failure.step, **failure.event(), times=seen)
    code, decision = None, f"starting all ranks again (restart {restarts + 1} of {recovery.max_restarts})"
    if stop_requested:
        code, decision = EnvironmentFault.exit_code, "not started again, because the job was asked to stop"
    elif seen >= SAME_FAILURES:
        code = EXIT_NO_PROGRESS
        decision = f"the same {seen} times in a row; not started again. {_log_hint(log_dir, failure.rank)}"
    elif restarts >= recovery.max_restarts:
        code = EXIT_DEFECT if failure.how != "hang" else EnvironmentFault.exit_code
        decision = f"not started again (resilience.max_restarts={recovery.max_restarts})"
        decision += f". {_log_hint(log_dir, failure.rank)}"
    print_message(f"{failure}; {decision}")
    if code is None:
        record_event(recovery.run_dir, "restart", failure.step, restarts=restarts + 1)
    return code


def _log_hint(log_dir: Path, rank: int) -> str:
    log = log_of(log_dir, rank)
    return f"Its log is {log}" if log else "Its output is above"


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
    return Failure("hang", first.rank, step, first.beat.phase, hosts[first.rank], detail)


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

"""How one start of the workers ended: on one node, and for the whole job. Imports no torch."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.errors import EXIT_DEFECT, EXIT_ENVIRONMENT, EXIT_OK, EXIT_SAVED_AFTER_SIGNAL
from megatrain.resilience.failure import EXIT, SIGNAL, Failure
from megatrain.resilience.fault_classes import PEER, USER, ErrorReport
from megatrain.resilience.heartbeat import Beat
from megatrain.resilience.watchdog import Witness

Blame = tuple[int, int]
"""A sort key for workers that failed: the likeliest cause of the job's failure sorts first."""

GOOD_CODES = (EXIT_OK, EXIT_SAVED_AFTER_SIGNAL)
"""Exit codes of a worker that did not fail."""

SECONDARY_SIGNALS = (-signal.SIGABRT, -signal.SIGTERM)
"""Exit codes of a rank that may have died only because it lost a peer or was asked to exit."""

KILLED, TOLD, ABORTED, LOST_A_PEER = range(4)
"""How a worker failed, the likeliest cause of the others' failures first: a signal killed it, or it ended without a
word in the middle of training; it ended with an error of its own; it may have been aborted because of a peer; it says
no more than that a peer is gone, or nothing."""


@dataclass(frozen=True)
class StartOutcome:
    """How one start of a node's workers ended.

    `blame` is None if no worker of this node caused the end. `failure` is set if a restart may help. `message` is the
    text for the user. `rank0_code` is rank 0's exit code if it exited by itself: then its own message is already on the
    terminal. `witnesses` describes this node's ranks if the job hangs. `stop_requested` tells whether the node had
    received a signal to stop.
    """

    code: int
    blame: Blame | None = None
    failure: Failure | None = None
    message: str = ""
    rank0_code: int | None = None
    witnesses: tuple[Witness, ...] = ()
    stop_requested: bool = False

    @staticmethod
    def from_json(document: dict[str, Any]) -> StartOutcome:
        """Rebuild an outcome from the JSON form of `dataclasses.asdict(outcome)`."""
        witnesses = [Witness(**{**one, "beat": Beat(**one["beat"])}) for one in document["witnesses"]]
        failure = Failure(**document["failure"]) if document["failure"] else None
        blame = tuple(document["blame"]) if document["blame"] else None
        return StartOutcome(**{**document, "blame": blame, "failure": failure, "witnesses": tuple(witnesses)})


def suspicion(code: int, report: ErrorReport | None) -> int:
    """Return how a worker that failed with this exit code did: `KILLED`, `TOLD`, `ABORTED` or `LOST_A_PEER`."""
    if code in GOOD_CODES:
        return KILLED
    if code < 0 and not (code in SECONDARY_SIGNALS and report is not None):
        return ABORTED if code in SECONDARY_SIGNALS else KILLED
    if report is not None:
        return LOST_A_PEER if report.kind == PEER else TOLD
    return {EXIT_ENVIRONMENT: LOST_A_PEER, EXIT_DEFECT: ABORTED}.get(code, TOLD)


def failure_of(rank: int, code: int, report: ErrorReport | None, beat: Beat, host: str) -> Failure | None:
    """Return the failure of a rank that ended, or None if its own message says it all and no restart may help.

    A process that ends by itself in the middle of training, without a report, is a failure whatever its exit code.
    """
    if report is not None:
        if report.kind == USER:
            return None
        how, kind, detail, place, trace = report.error, report.kind, report.message, report.place, report.trace
        return Failure(how, rank, beat.step, beat.phase, host, detail, kind, place, trace, beat.finished)
    if code < 0:
        return Failure(signal.Signals(-code).name, rank, beat.step, beat.phase, host, kind=SIGNAL)
    if code in GOOD_CODES or beat.step:
        return Failure(f"exit code {code}", rank, beat.step, beat.phase, host, kind=EXIT)
    return None


def most_to_blame(outcomes: Sequence[StartOutcome]) -> StartOutcome | None:
    """Return the outcome of the node whose worker most likely caused the end, or None if no worker failed."""
    blamed = [(outcome.blame, index) for index, outcome in enumerate(outcomes) if outcome.blame is not None]
    return outcomes[min(blamed)[1]] if blamed else None

"""How one start of the workers ended: on one node, and for the whole job. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.errors import EnvironmentFault
from megatrain.launch.rank_process import RankProcess
from megatrain.resilience.failure import Failure
from megatrain.resilience.heartbeat import Beat
from megatrain.resilience.watchdog import Witness

Blame = tuple[bool, bool, int]
"""A sort key for workers that failed: the likeliest cause of the job's failure sorts first."""


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


def blame(worker: RankProcess) -> Blame:
    """Return the sort key of a failed worker: killed workers first, those that may only have lost a peer last."""
    return not worker.killed, worker.code == EnvironmentFault.exit_code, worker.rank


def most_to_blame(outcomes: Sequence[StartOutcome]) -> StartOutcome | None:
    """Return the outcome of the node whose worker most likely caused the end, or None if no worker failed."""
    blamed = [(outcome.blame, index) for index, outcome in enumerate(outcomes) if outcome.blame is not None]
    return outcomes[min(blamed)[1]] if blamed else None

"""Protocols of the trainer's collaborators. The trainer knows only these, no layouts, ranks or libraries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatrain.checkpoint.manifest import Identity, Progress, RunRecord
from megatrain.data.batch import MicroBatch, StepBatch
from megatrain.engine.protocol import Engine
from megatrain.resilience.guard import Spike
from megatrain.train.exchange import Exchange


class Store(Protocol):
    """Where checkpoints go."""

    def save(self, state: dict[str, Tensor], record: RunRecord) -> float:
        """Begin to write a checkpoint; return the seconds that the loop was held up."""

    def copy(self, state: dict[str, Tensor], record: RunRecord) -> float:
        """Begin to keep a copy in memory that survives this process; return the seconds that the loop was held up."""

    @property
    def copies_every(self) -> int:
        """Steps between copies in memory; 0 for none."""

    @property
    def can_copy(self) -> bool:
        """Whether a copy can be made now."""

    @property
    def has_failed(self) -> bool:
        """Whether saving was given up."""

    def reports(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Return what became of saves since the last call: event kinds, steps and details."""

    def finish(self) -> None:
        """Wait until everything is written; raise the error that made saving give up."""


class Journal(Protocol):
    """Where metrics and events go; it does nothing on ranks other than the main one."""

    def step(self, record: dict[str, Any]) -> None:
        """Record one optimizer step."""

    def event(self, kind: str, step: int, **detail: Any) -> None:
        """Record an event."""


class Heldout(Protocol):
    """This rank's share of the held-out data."""

    def batches(self) -> Iterable[MicroBatch]:
        """Return the batches, from the first one on."""

    @property
    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes of a token, for bits per byte; None where unknown."""


class Clock(Protocol):
    """Times of this rank, and the signs of life that the agent watches."""

    @property
    def reads_late(self) -> bool:
        """Whether a step's result is read after the next step was submitted, so that the device never waits."""

    def enter(self, phase: str, step: int) -> None:
        """Tell the agent which phase of which step begins."""

    def event(self) -> Any:
        """Record a CUDA event on the current stream; None where the host's clock tells a step's time."""

    def blocked_s(self) -> float:
        """Return the seconds so far in which this rank waited for others."""


class StopSignal(Protocol):
    """The request to save and stop."""

    @property
    def signal_number(self) -> int:
        """The signal that this rank received; 0 for none."""


class Rollback(Protocol):
    """Takes engine and data back to before a loss spike, on all ranks at once."""

    def __call__(self, progress: Progress, spike: Spike) -> Progress | None:
        """Return where the run stands afterwards; None where there is no checkpoint to go back to."""


class SlowRanks(Protocol):
    """Watches for ranks that hold the others up."""

    def __call__(self, step: int, own_times: list[float]) -> None:
        """Judge every rank's own seconds of a step."""


@dataclass(frozen=True)
class Throughput:
    """Converter of tokens per second to model FLOPs utilisation; `peak_flops` is the whole job's, None if unknown."""

    flops_per_token: int
    peak_flops: float | None

    def mfu(self, tokens_per_s: float) -> float | None:
        """Return the share of the peak that the model's FLOPs use."""
        return tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None


@dataclass(frozen=True)
class Parts:
    """What the trainer works with. `identity` goes into every checkpoint."""

    engine: Engine
    stream: Iterator[StepBatch]
    heldout: Heldout | None
    store: Store
    journal: Journal
    exchange: Exchange
    clock: Clock
    stop: StopSignal
    rollback: Rollback
    slow_ranks: SlowRanks
    identity: Identity
    throughput: Throughput

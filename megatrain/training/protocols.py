"""Protocols of the trainer's collaborators. The trainer depends on these alone, not on layouts, ranks or libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatrain.checkpoint.manifest import Identity, Progress, RunRecord
from megatrain.data.batch import MicroBatch, StepBatch
from megatrain.engine.protocol import Engine
from megatrain.resilience.guard import Spike
from megatrain.training.exchange import Exchange


class Store(Protocol):
    """Writer of checkpoints and of copies in memory."""

    def save(self, state: dict[str, Tensor], record: RunRecord) -> float:
        """Start writing a checkpoint; return the seconds for which the loop was blocked."""

    def copy(self, state: dict[str, Tensor], record: RunRecord) -> float:
        """Start a copy in memory that survives this process; return the seconds for which the loop was blocked."""

    @property
    def copies_every(self) -> int:
        """Steps between copies in memory; 0: no copies."""

    @property
    def can_copy(self) -> bool:
        """Whether a copy can be made now."""

    @property
    def has_failed(self) -> bool:
        """Whether saving has failed for good."""

    def reports(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Return the outcomes of saves since the last call: event kinds, steps and details."""

    def finish(self) -> None:
        """Wait until everything is written. If saving has failed for good, raise its error."""


class Journal(Protocol):
    """Recorder of metrics and events. It does nothing except on the main rank."""

    def step(self, record: dict[str, Any]) -> None:
        """Record one optimizer step."""

    def event(self, kind: str, step: int, **detail: Any) -> None:
        """Record an event."""

    def progress(self, step: int, text: str) -> None:
        """Show what the run does besides steps, until the next step or event. Nothing is recorded."""


class WeightedSource(Protocol):
    """A source of held-out data: its part in the mean of the losses."""

    @property
    def source(self) -> str:
        """The source's name in the records; "" for a run on one dataset."""

    @property
    def weight(self) -> float:
        """The source's relative weight in the run's held-out loss."""

    @property
    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes per token, for bits per byte; None if unknown."""


class Heldout(WeightedSource, Protocol):
    """This rank's share of the held-out data of one source."""

    @property
    def num_batches(self) -> int:
        """Batches of `train.global_batch_size` sequences that an evaluation reads, on all ranks together."""

    @property
    def all_batches(self) -> int:
        """Such batches of the whole split."""

    def batches_done(self, micro_batches: int) -> int:
        """Return how many such batches are done once each rank has done so many micro-batches."""

    def batches(self) -> Iterable[MicroBatch]:
        """Return the batches, starting with the first."""


class Clock(Protocol):
    """Timer of this rank's steps; it also reports the current phase to the agent."""

    @property
    def reads_late(self) -> bool:
        """Whether a result is read only after the next step was submitted, so that the device never waits."""

    def enter(self, phase: str, step: int) -> None:
        """Report to the agent that a phase of a step begins."""

    def event(self) -> Any:
        """Record a CUDA event on the current stream and return it; None if steps are timed by the host's clock."""

    def blocked_s(self) -> float:
        """Return the total seconds for which this rank has waited for others."""


class StopSignal(Protocol):
    """Request to save and stop."""

    @property
    def signal_number(self) -> int:
        """The signal that this rank received; 0: none."""


class Rollback(Protocol):
    """Rollback of engine and data to a point before a loss spike. All ranks must call it together."""

    def __call__(self, progress: Progress, spike: Spike) -> Progress | None:
        """Roll back and return the progress of the checkpoint; None if there is no checkpoint before the spike."""


class SlowRanks(Protocol):
    """Detector of ranks that slow the others down."""

    def __call__(self, step: int, own_times: list[float]) -> None:
        """Compare the ranks by their seconds in a step, excluding waits."""


class TaskScorer(Protocol):
    """Scorer of the engine's weights on tasks, or of their replies to held-out prompts.

    All ranks must call it together.
    """

    def __call__(self, step: int, beat: Callable[[str], None]) -> dict[str, float]:
        """Return the scores after a step by their names in metrics.jsonl; call `beat` with words of how far it is."""


@dataclass(frozen=True)
class Throughput:
    """Converter of tokens per second to model FLOPs utilisation (MFU).

    `peak_flops` is the peak of all devices of the job together, None if unknown.
    """

    flops_per_token: int
    peak_flops: float | None

    def mfu(self, tokens_per_s: float) -> float | None:
        """Return the fraction of the peak FLOPs that the model uses; None if the peak is unknown."""
        return tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None


@dataclass(frozen=True)
class Parts:
    """The trainer's collaborators. `identity` goes into every checkpoint.

    `state` returns all tensors that a checkpoint of a step holds, the engine's among them. `shares` returns
    what the run has seen of each source of a mixture (empty: one dataset).
    """

    engine: Engine
    stream: Iterator[StepBatch]
    heldout: Sequence[Heldout]
    store: Store
    journal: Journal
    exchange: Exchange
    clock: Clock
    stop: StopSignal
    rollback: Rollback
    slow_ranks: SlowRanks
    shares: Callable[[Progress], dict[str, Any]]
    identity: Identity
    throughput: Throughput
    state: Callable[[int], dict[str, Tensor]]
    tasks: TaskScorer | None = None
    replies: TaskScorer | None = None

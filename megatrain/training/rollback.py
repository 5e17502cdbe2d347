"""Roll a running job back to the newest checkpoint before a loss spike, and skip the samples that led to the spike.

The loss guard (`resilience/guard.py`) decides when. This module restores, together, all that must match on a rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatrain.checkpoint.manifest import EarlyStop, Manifest, Progress
from megatrain.checkpoint.memory_store import MemoryStore
from megatrain.checkpoint.store import CheckpointStore
from megatrain.data.loader import TrainStream
from megatrain.data.order import Order, merge_ranges, take
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine
from megatrain.errors import CheckpointError
from megatrain.reinforcement.stream import RolloutStream
from megatrain.resilience.guard import Spike
from megatrain.tracking.journal import Journal
from megatrain.training.origin import Origin, load_origin

_LOG = logging.getLogger("megatrain")


@dataclass(frozen=True)
class CheckpointRollback:
    """Rollback, which all ranks must call together. `batch_size` returns the number of samples in a step.

    No checkpoint before step `not_before` is used: a resume changed what led to it (`checkpoint.override`). A resume
    from step `reset_at` began early stopping anew, which its checkpoint does not know.
    """

    world: World
    engine: Engine
    store: CheckpointStore
    memory: MemoryStore | None
    journal: Journal
    stream: TrainStream | RolloutStream
    order: Order
    batch_size: Callable[[int], int]
    skip_steps: int
    not_before: int = 0
    reset_at: int | None = None

    def __call__(self, progress: Progress, spike: Spike) -> Progress | None:
        """Restore engine and stream to a checkpoint before the spike and return its progress.

        Return None, with nothing changed, if there is none. If the process dies during the rollback, the run resumes
        from that checkpoint and reaches the spike again.
        """
        first = max(1, spike.step - self.skip_steps + 1)
        found = self._checkpoint_before(first, spike.step)
        if found is None:
            _LOG.warning("the loss spiked at step %d, and there is no checkpoint before it to go back to", spike.step)
            return None
        folder, manifest = found
        then = manifest.progress
        positions = self._samples(then, max(first, then.step + 1), progress)
        skip_range = (int(positions[0]), progress.cursor)
        self.world.heartbeat.enter("load")
        load_origin(Origin(folder, manifest, resumes=True), self.engine, self.world)
        self.store.set_aside(then.step)
        if self.memory is not None:
            self.memory.forget()
        cut = self.journal.cut(then.step)
        ranges = merge_ranges([*progress.skip_ranges, skip_range])
        self.stream.restart(then.step + 1, then.cursor, ranges)
        self.journal.event(
            "rollback",
            spike.step,
            from_step=spike.step,
            to_step=then.step,
            checkpoint=str(folder),
            skip_range=skip_range,
            windows=self.order.windows(positions).tolist(),
            cut_metrics=str(cut) if cut else None,
        )
        seen = {**asdict(spike), "skip_range": list(skip_range)}
        guard = replace(then.loss_guard, rollbacks=[*progress.loss_guard.rollbacks, seen])
        early_stop = EarlyStop() if then.step == self.reset_at else then.early_stop
        return replace(then, skip_ranges=ranges, loss_guard=guard, early_stop=early_stop)

    def _checkpoint_before(self, first: int, spiked: int) -> tuple[Path, Manifest] | None:
        """Return the newest valid checkpoint before step `first`, else before the spike, else None."""
        for step in (first, spiked):
            with suppress(CheckpointError):  # all are damaged, which the store has reported
                found = self.store.newest_valid(before=step)
                if found and found[1].step >= self.not_before:
                    return found
        return None

    def _samples(self, then: Progress, first: int, now: Progress) -> Any:
        """Return the samples of steps `first` to `now.step`, counting from the checkpoint `then`.

        Skip ranges added after that checkpoint lie before its cursor, so the current ranges give the same samples.
        """
        ahead = sum(self.batch_size(step) for step in range(then.step + 1, first))
        _, cursor = take(then.cursor, ahead, now.skip_ranges)
        taken = sum(self.batch_size(step) for step in range(first, now.step + 1))
        positions, end = take(cursor, taken, now.skip_ranges)
        assert end == now.cursor, (end, now.cursor)
        return positions

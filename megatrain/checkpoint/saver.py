"""Checkpoints without stopping: the state is copied to host memory, and written while training goes on.

One save at a time: a second waits for the first, or takes its place where the first has failed and waits to be tried again.
What a checkpoint is, and how it is written, is `store.py`'s.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.manifest import RunRecord
from megatrain.checkpoint.memory_store import MemoryStore
from megatrain.checkpoint.piece import Piece
from megatrain.checkpoint.store import CheckpointStore
from megatrain.config import CheckpointConfig
from megatrain.errors import EnvironmentFault

_LOG = logging.getLogger("megatrain")


Report = tuple[str, int, dict[str, Any]]
"""What became of a save: an event's kind (`save` or `save_failed`), the step, and detail."""


class Staging:
    """A copy of a state in host memory. The memory is kept for the next copy: making it costs more than copying."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state's values as they are now, to be read until the next call."""
        on_gpu = False
        for name, tensor in state.items():
            source = tensor.flat if isinstance(tensor, Piece) else tensor.detach()
            on_gpu = on_gpu or source.is_cuda
            held = self._copies.get(name)
            flat = held.flat if isinstance(held, Piece) else held
            if flat is None or flat.shape != source.shape or flat.dtype != source.dtype:
                flat = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            flat.copy_(source, non_blocking=True)
            self._copies[name] = tensor.over(flat) if isinstance(tensor, Piece) else flat
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return {name: self._copies[name] for name in state}


class Saver:
    """Saves a run's checkpoints in the background, and retires old ones. All ranks call the same methods in step."""

    def __init__(
        self, store: CheckpointStore, config: CheckpointConfig, memory: MemoryStore | None = None, on_gpu: bool = False
    ) -> None:
        """`store` and `memory` must be used by no other thread while a save is pending (see `finish`)."""
        self.copies_every = config.copies_every(on_gpu) if memory else 0
        self._store = store
        self._memory = memory
        self._config = config
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._superseded = threading.Event()
        self._reports: list[Report] = []
        self._failures = 0
        self._error: BaseException | None = None

    def save(self, state: dict[str, Tensor], record: RunRecord) -> float:
        """Copy the state and begin to write it; the seconds that the caller was held up.

        Raises:
            EnvironmentFault: the disk has refused too often.
        """
        started = time.perf_counter()
        self._superseded.set()
        self.finish()
        self._superseded.clear()
        waited = time.perf_counter() - started
        staged = self._staging.copy(state)
        stall = time.perf_counter() - started
        self._begin(self._work, staged, record, waited, stall)
        if not self._config.background:
            self.finish()
        return time.perf_counter() - started

    def copy(self, state: dict[str, Tensor], record: RunRecord) -> float:
        """Keep a copy in the agent's memory; the seconds that the caller was held up. Nothing may be pending."""
        started = time.perf_counter()
        self.finish()
        self._begin(self._work_in_memory, self._staging.copy(state), record)
        return time.perf_counter() - started

    @property
    def can_copy(self) -> bool:
        """Whether there is a memory for copies, and no save pending that a copy would have to wait for."""
        return self._memory is not None and (self._thread is None or not self._thread.is_alive())

    @property
    def has_failed(self) -> bool:
        """Whether saving was given up; `finish` then raises why."""
        return self._error is not None

    def reports(self) -> list[Report]:
        """What became of saves since this was called last."""
        reports, self._reports = self._reports, []
        return reports

    def finish(self) -> None:
        """Wait until nothing is pending.

        Raises:
            EnvironmentFault: the disk has refused too often.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _begin(self, work: Callable[..., None], *given: Any) -> None:
        self._thread = threading.Thread(target=work, args=given, name="checkpoint", daemon=True)
        self._thread.start()

    def _work_in_memory(self, state: dict[str, Tensor], record: RunRecord) -> None:
        """Make one copy; where the memory is too small, on any node, there will be no further one (in a thread)."""
        assert self._memory is not None, "asked for by can_copy"
        try:
            self._memory.save(state, record)
        except EnvironmentFault as error:
            self._memory = None
            _LOG.warning(
                "copies in memory are given up, a restart will go on from the last checkpoint: %s. Give /dev/shm more room "
                "(docker: --shm-size), or set checkpoint.memory_every=0",
                error,
            )
            self._reports.append(("copy_failed", record.progress.step, {"reason": str(error)}))
        except BaseException as error:  # whatever it is, the training thread is to hear of it
            self._error = error

    def _work(self, state: dict[str, Tensor], record: RunRecord, waited: float, stall: float) -> None:
        """Write one checkpoint, again where the disk refuses (in a thread)."""
        step = record.progress.step
        try:
            started = time.perf_counter()
            while True:
                try:
                    folder = self._store.save(state, record)
                    break
                except EnvironmentFault as error:
                    self._failures += 1
                    if self._give_up(step, error):
                        return
            self._failures = 0
            self._store.retire(self._config.keep, self._config.keep_every)
            detail = {"checkpoint": str(folder), "seconds": time.perf_counter() - started}
            self._reports.append(("save", step, {**detail, "stall_s": stall, "waited_s": waited}))
        except BaseException as error:  # whatever it is, the training thread is to hear of it
            self._error = error

    def _give_up(self, step: int, error: EnvironmentFault) -> bool:
        """After a failure: say so, wait for the next try; whether there is none, on all ranks alike."""
        limit = self._config.retries
        last = self._failures > limit
        what_now = f"given up after {self._failures} failures in a row" if last else "to be tried again"
        _LOG.warning("checkpoint of step %d: %s; %s", step, error, what_now)
        self._reports.append(("save_failed", step, {"reason": str(error), "failures": self._failures}))
        if last:
            self._error = EnvironmentFault(
                f"{self._failures} saves in a row have failed (checkpoint.retries={limit}): {error}. Make room or mend the "
                f"disk, then start again"
            )
            return True
        newer = self._superseded.wait(self._config.retry_wait_s)
        return any(self._store.world.all_gather_json(newer))

"""Asynchronous checkpoints: copy the state to host memory, then write it to the disk while training continues.

Only one save runs at a time. A second save waits for the first. If the first is waiting for a retry, the second
replaces it.
`store.py` writes the checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
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
"""Outcome of a save: the kind of the event (`save`, `save_failed` or `copy_failed`), the step, and details."""


TELL_S = 1.0
"""Seconds between two reports of how long a caller has waited for a save."""

ALIGNMENT = 64
"""Bytes at whose multiples the tensors of a staging block begin: a cache line, a multiple of every element size."""


class Staging:
    """A copy of a state in one block of host memory. The block is reused: allocating takes longer than copying.

    For a state on a GPU the block is page-locked, so that copying needs no buffer in between. It is registered with
    CUDA, because torch's allocator of page-locked memory rounds each tensor up to a power of two.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._unlock: Callable[[], object] = lambda: None

    def copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy of the state, valid until the next call."""
        sources = {name: held.flat if isinstance(held, Piece) else held.detach() for name, held in state.items()}
        on_gpu = any(source.is_cuda for source in sources.values())
        if _forms(self._copies) != _forms(sources):
            self._allocate(sources, on_gpu)
        for name, source in sources.items():
            self._copies[name].copy_(source, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return {
            name: tensor.over(self._copies[name]) if isinstance(tensor, Piece) else self._copies[name]
            for name, tensor in state.items()
        }

    def _allocate(self, sources: dict[str, Tensor], on_gpu: bool) -> None:
        """Make a block for copies of `sources`, and drop the one before."""
        self._unlock()
        self._copies = {}
        ends = list(accumulate(-(-source.nbytes // ALIGNMENT) * ALIGNMENT for source in sources.values()))
        block = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8)
        for (name, source), start in zip(sources.items(), [0, *ends], strict=False):
            part = block[start : start + source.nbytes]
            self._copies[name] = part.view(source.dtype).view(source.shape)
        if on_gpu and _lock(block):
            # the block lives until its pages are free again, for CUDA would take other memory there for locked
            unlock = weakref.finalize(self, lambda: torch.cuda.cudart().cudaHostUnregister(block.data_ptr()))
            unlock.atexit = False
            self._unlock = unlock


def _lock(block: Tensor) -> bool:
    """Page-lock a block of host memory for CUDA; if that is impossible, log a warning and return False."""
    code = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0))
    if code:
        with suppress(RuntimeError):  # CUDA keeps the error, and the next kernel's start reports it once
            torch.zeros(1, device="cuda")
        _LOG.warning("%d bytes cannot be page-locked (CUDA error %d): saving blocks longer", block.nbytes, code)
    return code == 0


def _forms(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


class Saver:
    """Background writer of a run's checkpoints. All ranks must call its methods in the same order."""

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        memory: MemoryStore | None = None,
        on_gpu: bool = False,
        waiting: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """No other thread may use `store` or `memory` while a save is pending (see `finish`).

        `waiting` is called every `TELL_S` seconds while the caller is blocked by a save, with the seconds so far.
        """
        self._waiting = waiting
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
        """Copy the state, start writing it, and return the seconds for which the caller was blocked.

        Raises:
            EnvironmentFault: too many saves in a row have failed.
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
        """Copy the state into the agent's memory; return the seconds for which the caller was blocked.

        No save may be pending.
        """
        started = time.perf_counter()
        self.finish()
        self._begin(self._work_in_memory, self._staging.copy(state), record)
        return time.perf_counter() - started

    @property
    def can_copy(self) -> bool:
        """Whether copies in memory are enabled and no save is running that a copy would have to wait for."""
        return self._memory is not None and (self._thread is None or not self._thread.is_alive())

    @property
    def has_failed(self) -> bool:
        """Whether saving has failed for good. If so, `finish` raises the error."""
        return self._error is not None

    def reports(self) -> list[Report]:
        """Return the outcomes of saves since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def finish(self) -> None:
        """Wait until no save is pending.

        Raises:
            EnvironmentFault: too many saves in a row have failed.
        """
        if self._thread is not None:
            started = time.perf_counter()
            while self._thread.is_alive():
                self._thread.join(TELL_S)
                if self._thread.is_alive():
                    self._waiting(time.perf_counter() - started)
            self._thread = None
        if self._error is not None:
            raise self._error

    def _begin(self, work: Callable[..., None], *given: Any) -> None:
        self._thread = threading.Thread(target=work, args=given, name="checkpoint", daemon=True)
        self._thread.start()

    def _work_in_memory(self, state: dict[str, Tensor], record: RunRecord) -> None:
        """Make one copy (in the thread). If any node has too little memory, disable further copies."""
        assert self._memory is not None, "asked for by can_copy"
        try:
            self._memory.save(state, record)
        except EnvironmentFault as error:
            self._memory = None
            _LOG.warning(
                "copies in memory are disabled, so a restart will continue from the last checkpoint: %s. Enlarge "
                "/dev/shm (docker: --shm-size), or set checkpoint.memory_every=0",
                error,
            )
            self._reports.append(("copy_failed", record.progress.step, {"reason": str(error)}))
        except BaseException as error:  # any error is re-raised in the training thread
            self._error = error

    def _work(self, state: dict[str, Tensor], record: RunRecord, waited: float, stall: float) -> None:
        """Write one checkpoint (in the thread); retry if the disk cannot be written."""
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
        except BaseException as error:  # any error is re-raised in the training thread
            self._error = error

    def _give_up(self, step: int, error: EnvironmentFault) -> bool:
        """Log the failure and wait; return True on all ranks if no retry is left or a newer save replaces this one."""
        limit = self._config.retries
        last = self._failures > limit
        what_now = f"giving up after {self._failures} failures in a row" if last else "will retry"
        _LOG.warning("checkpoint of step %d: %s; %s", step, error, what_now)
        self._reports.append(("save_failed", step, {"reason": str(error), "failures": self._failures}))
        if last:
            self._error = EnvironmentFault(
                f"{self._failures} saves in a row have failed (checkpoint.retries={limit}): {error}. Free space or "
                f"repair the disk, then start again"
            )
            return True
        newer = self._superseded.wait(self._config.retry_wait_s)
        return any(self._store.world.all_gather_json(newer))

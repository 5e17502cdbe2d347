"""How long this rank is held up by others: the time its training thread spends in blocking waits for communication.

On CPUs every collective ends in a wait that blocks the thread: `Work.wait` of torch's process groups (DeepSpeed, FSDP2,
pipelines and our own calls end there) or `wait_tensor` of its functional collectives (DTensor). On CUDA a wait only puts
an order on the stream, so the time means nothing there and nothing is measured. Inside code that torch.compile has
compiled, functional collectives are waited for out of Python's sight, and are not counted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional


class Waits:
    """Adds up the blocking waits of the thread that made it, a wait inside another one once.

    On CPUs autograd runs backward in the thread that asks for it, so that one thread is all of training; a checkpoint
    that is written in another one holds nobody up and does not count.
    """

    def __init__(self, tell: Callable[[int], None] = lambda nanoseconds: None) -> None:
        """`tell` hears of each wait."""
        self._thread = threading.get_ident()
        self._tell = tell
        self._inside = False
        self._waited = 0
        self._delayed = 0  # inside waits: after its wake-up
        self._scheduler: int | None = None
        with suppress(OSError):  # Linux alone has it
            self._scheduler = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def waited(self) -> float:
        """Seconds spent waiting for communication so far."""
        return self._waited / 1e9

    def held_up(self) -> float:
        """Seconds so far in which this thread could not do its own work: it waited for communication, or was ready to run
        while the kernel ran something else. On cores that are shared the latter is as much noise as all work there is."""
        return (self._waited + self._delay() - self._delayed) / 1e9

    def _delay(self) -> int:
        """Nanoseconds that this thread has been ready and did not run; 0 where the system does not tell."""
        if self._scheduler is None:
            return 0
        return int(os.pread(self._scheduler, 96, 0).split()[1])

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, which waits, with its time added up."""

        def wait(*args: Any, **kwargs: Any) -> Any:
            # the compiler reads no clocks, and would read this one only once
            if torch.compiler.is_compiling() or self._inside or threading.get_ident() != self._thread:
                return function(*args, **kwargs)
            self._inside = True
            delay, started = self._delay(), time.monotonic_ns()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.monotonic_ns() - started
                self._delayed += self._delay() - delay
                self._inside = False
                self._waited += spent
                self._tell(spent)

        return wait

    def close(self) -> None:
        """Let go of the kernel's counter."""
        if self._scheduler is not None:
            os.close(self._scheduler)
            self._scheduler = None


@contextmanager
def timed_waits(tell: Callable[[int], None] = lambda nanoseconds: None) -> Iterator[Waits]:
    """While this lasts, the calling thread's waits for communication are timed, and `tell` hears of each (nanoseconds)."""
    waits = Waits(tell)
    work_wait, wait_tensor = dist.Work.wait, functional.wait_tensor
    dist.Work.wait = waits.timed(work_wait)  # type: ignore[method-assign]
    functional.wait_tensor = waits.timed(wait_tensor)
    try:
        yield waits
    finally:
        waits.close()
        dist.Work.wait = work_wait  # type: ignore[method-assign]
        functional.wait_tensor = wait_tensor

"""Measure how long other ranks hold up this one: the time its training thread spends in blocking waits for them.

On CPUs every collective ends in a wait that blocks the thread: `Work.wait` of torch's process groups (DeepSpeed, FSDP2,
pipelines and our own calls) or `wait_tensor` of its functional collectives (DTensor). On CUDA a wait only orders work
on the stream; its duration means nothing, so callers do not measure there. Waits inside code compiled by torch.compile
do not pass through Python and are not counted.
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
    """Adds up the blocking waits of the thread that created it, counting nested waits once.

    On CPUs autograd runs backward in the calling thread, so one thread does all the training. A checkpoint written by
    another thread delays no rank and is not counted.
    """

    def __init__(self, report: Callable[[int], None] = lambda nanoseconds: None) -> None:
        """`report` is called with the nanoseconds of each wait."""
        self._thread = threading.get_ident()
        self._report = report
        self._inside = False
        self._waited = 0
        self._delayed = 0  # the part of the scheduler's delay that lies inside waits
        self._scheduler: int | None = None
        with suppress(OSError):  # exists on Linux only
            self._scheduler = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def waited(self) -> float:
        """Return the seconds spent waiting for communication so far."""
        return self._waited / 1e9

    def held_up(self) -> float:
        """Return the seconds so far in which this thread could not do its own work.

        That is the time it waited for communication, or was ready to run while the kernel ran something else. On shared
        cores the latter can be as long as the work itself, and is noise.
        """
        return (self._waited + self._delay() - self._delayed) / 1e9

    def _delay(self) -> int:
        """Return the nanoseconds this thread was ready to run but did not; 0 if the system does not count them."""
        if self._scheduler is None:
            return 0
        return int(os.pread(self._scheduler, 96, 0).split()[1])

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function`, which waits, so that its time is counted."""

        def wait(*args: Any, **kwargs: Any) -> Any:
            """Call the function and return its result; count the nanoseconds that it took in this thread."""
            # the compiler cannot trace a clock: it would read it once, at compile time
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
                self._report(spent)

        return wait

    def close(self) -> None:
        """Close the kernel's counter."""
        if self._scheduler is not None:
            os.close(self._scheduler)
            self._scheduler = None


@contextmanager
def timed_waits(report: Callable[[int], None] = lambda nanoseconds: None) -> Iterator[Waits]:
    """Time the calling thread's waits for communication. `report` is called with the nanoseconds of each."""
    waits = Waits(report)
    work_wait, wait_tensor = dist.Work.wait, functional.wait_tensor
    dist.Work.wait = waits.timed(work_wait)  # type: ignore[method-assign]
    functional.wait_tensor = waits.timed(wait_tensor)
    try:
        yield waits
    finally:
        waits.close()
        dist.Work.wait = work_wait  # type: ignore[method-assign]
        functional.wait_tensor = wait_tensor

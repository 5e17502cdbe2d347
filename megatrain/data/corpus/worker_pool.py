"""Worker processes and the bounded, ordered map that they run: the number of workers affects only speed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from megatrain.errors import EnvironmentFault
from megatrain.resilience.signals import set_parent_death_signal

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A pool of `count` worker processes; with a count of 1 the work is done in this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        # "spawn" inherits no threads or locks of this process.
        context = multiprocessing.get_context("spawn")
        self._pool = (
            ProcessPoolExecutor(count, mp_context=context, initializer=_follow_parent, initargs=(os.getpid(),))
            if count > 1
            else None
        )

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield `function` of each item, in order, with at most `2 * count` items in flight.

        Raises `EnvironmentFault` if a worker process dies.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        in_flight: deque[Future[R]] = deque()
        try:
            for item in items:
                in_flight.append(self._pool.submit(function, item))
                if len(in_flight) >= 2 * self.count:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                "a worker process of prepare died (out of memory?); "
                "try a smaller data.workers or data.max_document_bytes"
            ) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent(parent: int) -> None:
    """Leave Ctrl-C to the parent, which receives it too; on Linux, die with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal(parent)

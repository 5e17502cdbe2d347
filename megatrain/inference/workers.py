"""Several server processes that share one listening socket: start them, replace those that die, end them together."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from megatrain.errors import EXIT_BAD_CHECKPOINT, EXIT_BAD_CONFIG, EXIT_BAD_DATA, EXIT_OK, EnvironmentFault
from megatrain.resilience.terminal import say

MAX_DEATHS, WITHIN_S = 5, 60.0
"""So many deaths of workers in so many seconds end the server: starting them again does not help."""

_LAST_S = 10.0
"""Seconds, beyond the grace period, until a worker that does not end is killed."""


def run_workers(
    number: int, work: Callable[..., None], arguments: tuple[Any, ...], grace_s: float, announce: Callable[[], None]
) -> int:
    """Run `work(*arguments, is_ready)` in `number` processes until TERM or Ctrl-C, and return the exit code.

    Each releases the semaphore `is_ready` once it takes requests; `announce` is called when all do. A process that ends
    with the code of a user's mistake ends them all.

    Raises:
        EnvironmentFault: the workers die again and again.
    """
    context = multiprocessing.get_context("spawn")
    is_ready = context.Semaphore(0)
    deaths: deque[float] = deque(maxlen=MAX_DEATHS)
    num_ready = 0

    def start() -> SpawnProcess:
        process = context.Process(target=work, args=(*arguments, is_ready))
        process.start()
        return process

    with _stop_requests() as requests:
        workers = [start() for _ in range(number)]
        try:
            while not requests:
                connection.wait([worker.sentinel for worker in workers], timeout=0.2)
                while num_ready < number and is_ready.acquire(block=False):
                    num_ready += 1
                    if num_ready == number:
                        announce()
                for place, worker in enumerate(workers):
                    if worker.exitcode is None or requests:
                        continue
                    if worker.exitcode in (EXIT_BAD_CONFIG, EXIT_BAD_DATA, EXIT_BAD_CHECKPOINT):
                        return worker.exitcode
                    deaths.append(time.monotonic())
                    if len(deaths) == MAX_DEATHS and deaths[-1] - deaths[0] < WITHIN_S:
                        raise EnvironmentFault(f"{MAX_DEATHS} workers died within a minute; the lines above say why")
                    say(f"warning: worker {worker.pid} ended with code {worker.exitcode}; another one starts")
                    workers[place] = start()
            return EXIT_OK
        finally:
            _end(workers, grace_s)


def _end(workers: list[SpawnProcess], grace_s: float) -> None:
    for worker in workers:
        if worker.exitcode is None:
            worker.terminate()
    deadline = time.monotonic() + grace_s + _LAST_S
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.exitcode is None:
            worker.kill()
            worker.join()


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect the signals that ask this process to end."""
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

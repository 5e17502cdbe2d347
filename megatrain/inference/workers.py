"""Several server processes that share one listening socket: start them, replace those that fail, end them together."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any

from megatrain.errors import (
    EXIT_BAD_CHECKPOINT,
    EXIT_BAD_CONFIG,
    EXIT_BAD_DATA,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EnvironmentFault,
)
from megatrain.resilience.terminal import say

MAX_DEATHS, WITHIN_S = 5, 60.0
"""So many deaths of workers in so many seconds end the server: starting them again does not help."""

SILENCE_S = 15.0
"""Seconds without a sign of life after which a worker that was ready is killed."""

_LAST_S = 10.0
"""Seconds, beyond the grace period, until a worker that does not end is killed."""


@dataclass
class _Worker:
    process: SpawnProcess
    alive: Any
    """Shared number: the monotonic time of the last sign of life; 0 until the worker is ready."""

    @property
    def is_silent(self) -> bool:
        return bool(0 < self.alive.value < time.monotonic() - SILENCE_S)


def run_workers(
    number: int,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    listener: socket.socket,
    grace_s: float,
    announce: Callable[[], None],
) -> int:
    """Run `work(listener, *arguments, alive)` in `number` processes until TERM or Ctrl-C, and return the exit code.

    Each writes the monotonic time into `alive.value` once it takes requests, and then every second while it works;
    `announce` is called when all do. One that stops doing so is killed, and one that ends is replaced. A process that
    ends with the code of a user's mistake ends them all. A second signal kills them.

    Raises:
        EnvironmentFault: the workers die again and again.
    """
    context = multiprocessing.get_context("spawn")
    deaths: deque[float] = deque(maxlen=MAX_DEATHS)
    is_announced = False

    def start() -> _Worker:
        alive = context.Value("d", 0.0, lock=False)
        process = context.Process(target=work, args=(listener, *arguments, alive))
        process.start()
        return _Worker(process, alive)

    with stop_requests() as requests:
        workers = [start() for _ in range(number)]
        try:
            while not requests:
                connection.wait([worker.process.sentinel for worker in workers], timeout=0.2)
                if not is_announced and all(worker.alive.value for worker in workers):
                    is_announced = True
                    announce()
                for place, worker in enumerate(workers):
                    code = _ended(worker)
                    if code is None or requests:
                        continue
                    if code in (EXIT_BAD_CONFIG, EXIT_BAD_DATA, EXIT_BAD_CHECKPOINT):
                        return code
                    deaths.append(time.monotonic())
                    if len(deaths) == MAX_DEATHS and deaths[-1] - deaths[0] < WITHIN_S:
                        raise EnvironmentFault(f"{MAX_DEATHS} workers died within a minute; the lines above say why")
                    say(f"warning: worker {worker.process.pid} ended with code {code}; another one starts")
                    workers[place] = start()
        finally:
            listener.close()  # or clients whom nobody answers would wait in it
            is_killed = _end([worker.process for worker in workers], grace_s, requests)
    return EXIT_INTERRUPTED if is_killed else EXIT_OK


def _ended(worker: _Worker) -> int | None:
    """Return a worker's exit code, None while it works; kill one that does not."""
    if worker.process.exitcode is None and worker.is_silent:
        say(f"warning: worker {worker.process.pid} does not work any more; it is killed")
        worker.process.kill()
        worker.process.join()
    return worker.process.exitcode


def _end(workers: list[SpawnProcess], grace_s: float, requests: list[int]) -> bool:
    """End the workers. Return whether a second signal asked to kill them."""
    for worker in workers:
        if worker.exitcode is None:
            worker.terminate()
    deadline = time.monotonic() + grace_s + _LAST_S
    while any(worker.exitcode is None for worker in workers):
        if len(requests) > 1 or time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
                worker.join()
            break
        connection.wait([worker.sentinel for worker in workers if worker.exitcode is None], timeout=0.1)
    return len(requests) > 1


@contextmanager
def stop_requests() -> Iterator[list[int]]:
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

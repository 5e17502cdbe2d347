"""Ask the content checks, which run in processes of their own: one that hangs is killed and started again.

The checks themselves are in content_checks.py, and the process that runs them in check_worker.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from megatrain.config import ServeGroup
from megatrain.distributed.python_process import python_command
from megatrain.errors import ConfigError
from megatrain.inference.api_errors import ApiError

LOAD_LIMIT_S = 120.0
"""Longest time for importing a user's module, which may load a model."""

_KEYS = ("check_prompt", "check_reply", "blocked_words", "hold_back")


class CheckError(Exception):
    """A check raised, or ended its process."""


class ContentChecks:
    """The checks of a server, in `serve.check_processes` processes. Call `close` in any case.

    `of_prompts` and `of_replies` say whether there are any; `hold_back` is how many characters of a stream wait for
    those of the replies.
    """

    def __init__(self, config: ServeGroup) -> None:
        """Raises `ConfigError` if a check cannot be loaded."""
        self.of_prompts = (config.check_prompt or config.blocked_words) is not None
        self.of_replies = (config.check_reply or config.blocked_words) is not None
        self.hold_back, self.limit_s = 0, config.check_timeout_s
        self._all = [
            _Process(config) for _ in range(config.check_processes if self.of_prompts or self.of_replies else 0)
        ]
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(max(1, len(self._all)), "check")
        try:
            for process in self._all:
                self.hold_back = process.start()
                self._free.put(process)
        except CheckError as error:
            raise ConfigError(str(error)) from None
        finally:
            if self._free.qsize() < len(self._all):
                self.close()

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self._all:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            process.forget()

    async def refusal(self, kind: str, text: str, is_whole: bool, left_s: float) -> str | None:
        """Return why a `prompt` or `reply` is refused, or None; `left_s` seconds are left to its request.

        Raises `ApiError`: 504 if a check does not return in time, 500 if it fails.
        """
        request = {"kind": kind, "text": text, "is_whole": is_whole}
        deadline = time.monotonic() + left_s
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._ask, request, deadline)
        try:
            return await asyncio.wait_for(work, left_s)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise ApiError(504, f"the check of the {kind} does not end", code="timeout") from error
        except CheckError as error:
            raise ApiError(500, f"the check of the {kind} failed", code="content_check_failed") from error

    def _ask(self, request: dict[str, Any], deadline: float) -> str | None:
        """Ask a free process; there are as many as threads. Raises `CheckError` and `TimeoutError`."""
        process = self._free.get()
        try:
            if time.monotonic() > deadline:  # nobody waits for the answer any more
                raise TimeoutError("no process of the content checks was free in time")
            why: str | None = process.ask(request, self.limit_s)["why"]
            return why
        finally:
            self._free.put(process)


class _Process:
    """One process, started again by the request after a failure."""

    def __init__(self, config: ServeGroup) -> None:
        self._keys = json.dumps({name: value for name, value in asdict(config).items() if name in _KEYS})
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def start(self) -> int:
        """Start the process, and return the characters to hold back. Raises `CheckError`."""
        self._socket, theirs = socket.socketpair()
        self._rest = b""
        with theirs:
            number = theirs.fileno()
            command = python_command("megatrain.inference.check_worker", str(number), str(os.getpid()), self._keys)
            # a group of its own, which ends as one with whatever the checks have started
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=(number,), start_new_session=True
            )
        if self._is_closed:
            self.kill()
        try:
            hold_back: int = self._line(time.monotonic() + LOAD_LIMIT_S)["hold_back"]
            return hold_back
        except TimeoutError:
            self.forget()
            raise CheckError(f"the content checks cannot be loaded within {LOAD_LIMIT_S:g} seconds") from None

    def ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Return the answer to a request. Raises `CheckError`, and `TimeoutError` after the limit."""
        if self._process is None:
            self.start()
        deadline = time.monotonic() + limit_s
        try:
            self._socket.settimeout(max(0.001, limit_s))
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            return self._line(deadline)
        except TimeoutError:
            self.forget()
            raise TimeoutError(f"a content check did not return within {limit_s:.3g} seconds; it was killed") from None
        except OSError as error:
            self.forget()
            raise CheckError(f"the process of the content checks ended ({error.strerror})") from None

    def _line(self, deadline: float) -> dict[str, Any]:
        """Return the next answer. Raises `CheckError` for an error or none, `TimeoutError` for one that is late."""
        while b"\n" not in self._rest:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(1 << 16)
            if not data:
                process = self._process
                assert process is not None
                self.forget()  # it may have closed the socket and live on
                raise CheckError(f"a content check ended its process (exit code {process.returncode})")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CheckError(answer["error"])
        return answer

    def kill(self) -> None:
        """End the process for good, also while another thread waits for its answer."""
        self._is_closed = True
        self._signal()

    def forget(self) -> None:
        """Kill the process, and free what it used."""
        if self._process is not None:
            self._signal()
            self._process.wait()
            self._socket.close()
            self._process = None

    def _signal(self) -> None:
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

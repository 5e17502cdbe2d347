"""A fork server: forks ranks from a process that has already imported their modules. Linux only; imports no torch.

Importing torch and an engine costs each process seconds of CPU time. The fork server imports them once per node, for
the first start and every restart. Ranks are double-forked, and the agent is a subreaper, so a rank becomes the agent's
child. It has its own session and dies with the agent.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatrain.distributed.python_process import python_command
from megatrain.resilience.signals import set_parent_death_signal
from megatrain.resilience.terminal import Terminal

PR_SET_CHILD_SUBREAPER = 36
ANSWER_S = 300.0
"""Seconds to wait for a forked rank. Before the first one, imports take seconds, or minutes on a slow shared disk."""


class ForkServerError(Exception):
    """The fork server did not start a rank; the agent can still start it directly."""


class ForkedProcess:
    """A forked rank, with the methods of `subprocess.Popen` that the agent uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code (negative: the signal that killed the process), or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """Wait for the process to exit, and return its exit code."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


class ForkServer:
    """The agent's side of the fork server."""

    def __init__(self, modules: Sequence[str], environ: Mapping[str, str], inherited: Sequence[int], log: Path) -> None:
        """Start the server, which imports `modules` and prints to `log`. Ranks inherit the descriptors `inherited`.

        Raises:
            ForkServerError: the kernel does not support subreapers.
        """
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise ForkServerError("the kernel does not support PR_SET_CHILD_SUBREAPER")
        self._socket, server_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log = log
        number = server_socket.fileno()
        self.process = subprocess.Popen(
            python_command("megatrain.launch.fork_server", str(number), str(os.getpid()), str(log), *modules),
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(number, *inherited),
        )
        server_socket.close()

    def fork(
        self,
        module: str,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        log: Path | None,
        cancelled: Callable[[], bool],
    ) -> ForkedProcess:
        """Fork a rank that runs a module with `arguments`, with its output in `log` (None: the agent's own output).

        Raises:
            ForkServerError: there was no answer within `ANSWER_S`, or `cancelled` returned true.
        """
        request = {
            "module": module,
            "arguments": list(arguments),
            "environ": dict(environ),
            "log": str(log) if log else None,
        }
        deadline = time.monotonic() + ANSWER_S
        try:
            self._socket.send(json.dumps(request).encode())
            while not select.select([self._socket], [], [], 0.05)[0]:
                if time.monotonic() > deadline or cancelled():
                    raise ForkServerError(f"no answer within {ANSWER_S:g} s")
            answer = self._socket.recv(64)
        except OSError as error:
            raise ForkServerError(str(error)) from error
        if not answer:
            raise ForkServerError(f"the fork server ended with exit code {self.process.wait()}; its log is {self._log}")
        return ForkedProcess(int(answer))

    def close(self) -> None:
        """Kill the server. The ranks keep running."""
        self._socket.close()
        self.process.kill()
        self.process.wait()


def main() -> NoReturn:
    """Run the server: import the modules, then fork a rank for each request until the agent is gone."""
    number, agent, log, *modules = sys.argv[1:]
    agent_pid = int(agent)
    terminal = [os.dup(1), os.dup(2)]
    _print_to(log)
    Terminal.install().keep_going()
    set_parent_death_signal(agent_pid)
    requests = socket.socket(fileno=int(number))
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or each rank's first garbage collection would write to the shared pages, and so copy them
    while request := requests.recv(1 << 20):
        intermediate = os.fork()
        if intermediate == 0:
            if os.fork():
                os._exit(0)  # the rank becomes the agent's child
            _become_rank(json.loads(request), agent_pid, requests, terminal)
        os.waitpid(intermediate, 0)
    sys.exit(0)


def _print_to(log: str) -> None:
    """Lead file descriptors 1 and 2 to a log, or to nowhere if it cannot be opened."""
    try:
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError:
        file = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def _become_rank(request: dict[str, Any], agent: int, answers: socket.socket, terminal: list[int]) -> NoReturn:
    """Turn this forked process into the requested rank, and run its module.

    Its output goes to the request's log, or to the file descriptors `terminal` if there is no log.
    """
    deadline = time.monotonic() + 10
    while os.getppid() != agent and time.monotonic() < deadline:
        time.sleep(0.001)  # until the agent has adopted this process
    os.setsid()
    set_parent_death_signal(agent)
    if request["log"]:
        _print_to(request["log"])
    else:
        for stream, file in zip((1, 2), terminal, strict=True):
            os.dup2(file, stream)
    for file in terminal:
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environ"])
    answers.send(str(os.getpid()).encode())
    answers.close()
    gc.unfreeze()
    sys.argv[1:] = request["arguments"]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    main()

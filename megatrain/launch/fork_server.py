"""Starts ranks by forking them from a process that has already imported what they need. Linux only; imports no torch.

Importing torch and an engine takes seconds of a core in every process. Here it is done once a node, for the first start and
for every restart. A forked rank is a child of the agent like any other (the agent is a subreaper, and the process between
has ended), in a session of its own, and dies with it.
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

from megatrain.resilience.signals import set_parent_death_signal

PR_SET_CHILD_SUBREAPER = 36
ANSWER_S = 300.0
"""Longest wait for a forked rank: the imports before the first one take seconds, minutes on a slow shared disk."""


class ForkServerError(Exception):
    """No rank came of it; the ranks can still be started one by one."""


class ForkedProcess:
    """A forked rank, with what `subprocess.Popen` offers of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code (negative: the signal that killed it), or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """The exit code, once it has ended."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As Popen's: nothing happens to one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)


class ForkServer:
    """The agent's end."""

    def __init__(self, modules: Sequence[str], environ: Mapping[str, str], inherited: Sequence[int]) -> None:
        """Start importing `modules`; ranks will inherit the files numbered `inherited`. Raises ForkServerError."""
        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise ForkServerError("the kernel lets no process adopt its grandchildren")
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = theirs.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megatrain.launch.fork_server", str(number), str(os.getpid()), *modules],
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(number, *inherited),
        )
        theirs.close()

    def fork(
        self,
        module: str,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        log: Path | None,
        hurry: Callable[[], bool],
    ) -> ForkedProcess:
        """Fork a rank that does what `python -m module arguments` would; its output goes to `log` (None: to ours).

        Raises:
            ForkServerError: it did not come within `ANSWER_S`, or `hurry` became true meanwhile.
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
                if time.monotonic() > deadline or hurry():
                    raise ForkServerError(f"no answer within {ANSWER_S:g} s")
            answer = self._socket.recv(64)
        except OSError as error:
            raise ForkServerError(str(error)) from error
        if not answer:
            raise ForkServerError(f"it ended with exit code {self.process.wait()}")
        return ForkedProcess(int(answer))

    def close(self) -> None:
        """End it; the ranks live on."""
        self._socket.close()
        self.process.kill()
        self.process.wait()


def main() -> NoReturn:
    """The nursery's own process: import, then fork a rank for each request until the agent is gone."""
    number, agent, *modules = sys.argv[1:]
    agent_pid = int(agent)
    set_parent_death_signal(agent_pid)
    requests = socket.socket(fileno=int(number))
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # or every rank's first collection would copy what all could share
    while request := requests.recv(1 << 20):
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)  # the rank is the agent's child from here on
            _become_rank(json.loads(request), agent_pid, requests)
        os.waitpid(between, 0)
    sys.exit(0)


def _become_rank(request: dict[str, Any], agent: int, answers: socket.socket) -> NoReturn:
    deadline = time.monotonic() + 10
    while os.getppid() != agent and time.monotonic() < deadline:
        time.sleep(0.001)  # the process between is ending
    os.setsid()
    set_parent_death_signal(agent)
    if request["log"]:
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
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

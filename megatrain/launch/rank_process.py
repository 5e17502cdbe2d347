"""The processes of this node's ranks: start one, set its environment, describe its end. Imports no torch.

The agent (`agent.py`) decides which ranks to start, and what to do when one ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatrain.distributed.rank_environment import WORKER_MARK, usable_cores
from megatrain.errors import EnvironmentFault
from megatrain.launch.fork_server import ForkedProcess
from megatrain.launch.nodes import Peers
from megatrain.resilience.signals import set_parent_death_signal

LINUX = sys.platform == "linux"

GONE_S = 120.0
"""Seconds to wait for a killed rank to exit: freeing hundreds of gigabytes takes time."""


@dataclass
class RankProcess:
    """One rank's process. `code` is its exit code (negative: the signal that killed it), None while it runs."""

    rank: int
    local_rank: int
    process: subprocess.Popen[bytes] | ForkedProcess
    log: Path | None
    code: int | None = None

    @property
    def killed(self) -> bool:
        """Return whether a signal killed it."""
        return self.code is not None and self.code < 0

    def kill(self) -> None:
        """Kill this worker and its child processes, and wait until it has exited.

        Raises:
            EnvironmentFault: the process does not exit, because it is stuck in a driver or a file system. It is marked
                as killed all the same.
        """
        with contextlib.suppress(ProcessLookupError):  # it has already ended
            os.killpg(self.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + GONE_S
        while (code := self.process.poll()) is None:
            if time.monotonic() > deadline:
                self.code = -signal.SIGKILL
                raise EnvironmentFault(
                    f"rank {self.rank}, process {self.process.pid} on {socket.gethostname()}, was killed {GONE_S:g} s "
                    f"ago and still exists: it is stuck in a device driver or a file system"
                )
            time.sleep(0.005)
        self.code = code


KEEP_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
"""Makes glibc keep freed memory for the next step.

By default it returns every large tensor to the kernel, which must zero the pages again for the next one: a tenth of a
step of gpt2_124m on two cores. The price is that a rank's memory never shrinks. Other C libraries ignore the setting.
"""

EXPANDABLE = "expandable_segments:True"
"""Makes torch map GPU memory by the page, which avoids fragmentation: models that almost fill a GPU fit."""


def rank_environ(local_rank: int, num_workers: int, peers: Peers, port: int) -> dict[str, str]:
    """Return the environment variables of a rank."""
    defaults = {"OMP_NUM_THREADS": str(max(1, usable_cores() // num_workers)), "GLIBC_TUNABLES": KEEP_MEMORY}
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the variable
        defaults["PYTORCH_ALLOC_CONF"] = EXPANDABLE
    if LINUX and peers.size == 1:
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return {
        **defaults,
        **os.environ,
        WORKER_MARK: "1",
        "RANK": str(peers.node * num_workers + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(peers.size * num_workers),
        "LOCAL_WORLD_SIZE": str(num_workers),
        "MASTER_ADDR": peers.address,
        "MASTER_PORT": str(port),
    }


def fork_server_environ(environ: dict[str, str]) -> dict[str, str]:
    """Return a worker's environment without the variables that make it a rank."""
    rank_names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in environ.items() if name not in rank_names}
    # DeepSpeed picks its accelerator on import; the fork server imports it only on a machine without a GPU
    return {"DS_ACCELERATOR": "cpu", **kept}


def log_name(rank: int) -> str:
    """Return the name of a rank's log file."""
    return f"rank_{rank:05d}.log"


def log_of(log_dir: Path, rank: int) -> Path | None:
    """Return the file that a rank's output goes to, or None for rank 0: it prints on the terminal and to its log."""
    if rank == 0:
        return None
    log_dir.mkdir(parents=True, exist_ok=True)
    return log_dir / log_name(rank)


def start_rank(command: Sequence[str], environ: dict[str, str], log_dir: Path, heartbeats: int) -> RankProcess:
    """Start one rank in its own session. It inherits the file descriptor `heartbeats`."""
    rank = int(environ["RANK"])
    log = log_of(log_dir, rank)
    sink: IO[bytes] | None = log.open("ab") if log is not None else None
    try:
        process = subprocess.Popen(
            list(command),
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            pass_fds=(heartbeats,),
            preexec_fn=_die_with_agent() if LINUX else None,
        )
    finally:
        if sink is not None:
            sink.close()
    return RankProcess(rank, int(environ["LOCAL_RANK"]), process, log)


def _die_with_agent() -> Callable[[], None]:
    """Return a `preexec_fn` that makes a worker die with this agent."""
    agent = os.getpid()
    return lambda: set_parent_death_signal(agent)


def free_port() -> int:
    """Return a TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def describe_end(rank: int, code: int, log: Path | None) -> str:
    """Describe how a worker ended, with the end of its log if it has one."""
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += " (out of memory, perhaps)"
    else:
        how = f"ended with exit code {code}"
    if log is None:
        return f"rank {rank} {how}; its output is above, and in its log"
    lines = tail(log)
    return f"rank {rank} {how}; the end of its log {log}:\n" + "\n".join(f"  {line}" for line in lines)


def tail(path: Path, count: int = 20, window: int = 16384) -> list[str]:
    """Return the last `count` lines of a text file, reading only its last `window` bytes."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - window))
        return file.read().decode("utf-8", "replace").splitlines()[-count:]

"""This process's rank, read from the environment that a launcher set, and its CPU cores. Imports no torch.

Our own agent (`launch/agent.py`) and torchrun set the same variables. A process without a launcher is rank 0 of 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatrain.errors import EnvironmentFault

WORKER_MARK = "MEGATRAIN_WORKER"
"""Set to 1 in the workers' environment by our agent, so that they do not start agents of their own."""

RESTARTS = "MEGATRAIN_RESTARTS"
"""How often our agent has restarted its workers; set in their environment."""


@dataclass(frozen=True)
class RankEnvironment:
    """One rank of a job. `master_addr` and `master_port` are None without a launcher."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    restarts: int = 0

    @staticmethod
    def from_environ(environ: Mapping[str, str] | None = None) -> RankEnvironment:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

        Raises EnvironmentFault if a variable is missing or invalid.
        """
        environ = os.environ if environ is None else environ
        if not is_launched(environ):
            return RankEnvironment()
        world_size = number_from(environ, "WORLD_SIZE", 1, None)
        rank = number_from(environ, "RANK", 0, world_size)
        local_world_size = number_from(environ, "LOCAL_WORLD_SIZE", 1, world_size + 1, default=world_size)
        local_rank = number_from(environ, "LOCAL_RANK", 0, local_world_size, default=rank)
        address = environ.get("MASTER_ADDR")
        if not address:
            raise EnvironmentFault("MASTER_ADDR is not set, although WORLD_SIZE is; the launcher has to set both")
        port = number_from(environ, "MASTER_PORT", 1, 65536)
        restarts = number_from(environ, RESTARTS, 0, None, default=0)
        return RankEnvironment(rank, local_rank, world_size, local_world_size, address, port, restarts)


def is_launched(environ: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher (our agent, or torchrun) started this process as one of its ranks."""
    environ = os.environ if environ is None else environ
    return "WORLD_SIZE" in environ and "RANK" in environ


def was_requeued(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this is a Slurm job that was requeued."""
    return (os.environ if environ is None else environ).get("SLURM_RESTART_COUNT", "0") != "0"


def usable_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def number_from(environ: Mapping[str, str], name: str, low: int, high: int | None, default: int | None = None) -> int:
    """Return an integer in [low, high) from the environment. Raises EnvironmentFault if it is missing or invalid."""
    text = environ.get(name)
    if text is None and default is not None:
        text = str(default)
    allowed = f"a whole number of at least {low}" + ("" if high is None else f" and below {high}")
    if text is None:
        raise EnvironmentFault(f"{name} is not set in the environment of a launched process; expected {allowed}")
    if not text.strip().isdecimal() or int(text) < low or (high is not None and int(text) >= high):
        raise EnvironmentFault(f"{name}={text} in the environment: expected {allowed}")
    return int(text)

"""This process's place among the ranks: its device, and the few host-side exchanges the trainer needs.

Collectives of training (gradients, parameters) belong to the engines; how the ranks were started, to `local.py`.
"""

from __future__ import annotations

import datetime
import json
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.config import LaunchConfig
from megatrain.distributed.devices import device_of_rank
from megatrain.distributed.rank_environment import RankEnvironment
from megatrain.errors import EnvironmentFault
from megatrain.resilience.heartbeat import Heartbeat

RENDEZVOUS_GRACE_S = 5.0
"""Seconds beyond launch.timeout_s that torch has to say by itself why ranks could not meet."""


@dataclass
class World:
    """The ranks of this job as one of them sees it. `control` is a gloo group for host-side values, None alone;
    `heartbeat` tells the agent where this one is; `timeout` limits every exchange; `local_size` ranks are on each node."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    timeout: datetime.timedelta = datetime.timedelta(minutes=10)
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files that only one may write."""
        return self.rank == 0

    def all_gather(self, values: Tensor) -> Tensor:
        """Every rank's CPU tensor (same shape and dtype), stacked in rank order: `[size, *values.shape]`."""
        if self.control is None:
            return values.unsqueeze(0)
        out = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(out, values.contiguous(), group=self.control)
        return torch.stack(out)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks of a tensor on this rank's device, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order."""
        if self.control is None:
            return [value]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor(payload.numel()))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: payload.numel()] = payload
        rows = self.all_gather(padded)
        return [json.loads(bytes(row[: int(size)].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def with_own_control_group(self) -> World:
        """The same ranks with a control group of their own, for exchanges in another thread. All ranks must call it."""
        if self.control is None:
            return self
        return replace(self, control=dist.new_group(backend="gloo", timeout=self.timeout))

    def node_world(self) -> World:
        """The ranks of this node among themselves, numbered by local rank. All ranks must call it."""
        if self.local_size == self.size:
            return self.with_own_control_group()
        control = None
        if self.local_size > 1:
            first = self.rank - self.local_rank
            ranks = list(range(first, first + self.local_size))
            control = dist.new_group(ranks, backend="gloo", timeout=self.timeout, use_local_synchronization=True)
        return replace(self, rank=self.local_rank, size=self.local_size, control=control)

    def barrier(self) -> None:
        """Wait for all ranks (no longer than launch.timeout_s)."""
        if self.control is not None:
            dist.barrier(group=self.control)


def join(config: LaunchConfig, environment: RankEnvironment, heartbeat: Heartbeat | None = None) -> World:
    """Meet the other ranks and return this one's place among them.

    Raises:
        EnvironmentFault: no device for this rank, or a peer that cannot be reached within `launch.timeout_s`.
    """
    device = device_of_rank(config, environment)
    timeout = datetime.timedelta(seconds=config.timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if environment.master_addr is None:  # one process that nobody launched: it is its own rendezvous
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        try:
            dist.init_process_group(
                _backend(device),
                store=_find_store(environment, timeout),
                rank=environment.rank,
                world_size=environment.world_size,
                timeout=timeout,
            )
        except (dist.DistError, RuntimeError, TimeoutError, ValueError) as error:
            raise EnvironmentFault(
                f"rank {environment.rank} could not meet the other {environment.world_size - 1} ranks at "
                f"{environment.master_addr}:{environment.master_port} within {config.timeout_s:g} s "
                f"(launch.timeout_s): {error}"
            ) from error
    control = dist.new_group(backend="gloo", timeout=timeout) if environment.world_size > 1 else None
    place = environment.rank, environment.world_size, environment.local_rank
    return World(*place, device, control, heartbeat or Heartbeat(), timeout, environment.local_world_size)


def _find_store(environment: RankEnvironment, timeout: datetime.timedelta) -> dist.Store:
    """The ranks' store at the place that the launcher named.

    Found in a thread, since torch waits for ever for a server that accepts and never answers: somebody else's on this port.
    """
    found: list[dist.Store | Exception] = []

    def find() -> None:
        place = environment.rank, environment.world_size
        try:
            store = next(dist.rendezvous("env://", *place, timeout=timeout))[0]
            store.set_timeout(timeout)
            found.append(store)
        except (dist.DistError, RuntimeError, ValueError) as error:
            found.append(error)

    thread = threading.Thread(target=find, name="rendezvous", daemon=True)
    thread.start()
    thread.join(timeout.total_seconds() + RENDEZVOUS_GRACE_S)
    result = found[0] if found else TimeoutError("no answer; another program may have this port")
    if isinstance(result, Exception):
        raise result
    return result


def lost_peer(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone or silent: why, that rank's own message tells."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def leave() -> None:
    """Take the process group down, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"

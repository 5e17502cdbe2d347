"""The ranks of a job as one of them sees them, and the host-side exchanges between them.

The collectives of training (gradients, parameters) belong to the engines; starting the ranks, to `launch/`.
"""

from __future__ import annotations

import datetime
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.rendezvous import rendezvous

from megatrain.config import LaunchConfig
from megatrain.distributed.devices import device_of_rank, stay_near
from megatrain.distributed.rank_environment import RankEnvironment
from megatrain.errors import EnvironmentFault
from megatrain.resilience.heartbeat import Heartbeat

T = TypeVar("T")

RENDEZVOUS_GRACE_S = 5.0
"""Seconds beyond launch.timeout_s in which torch may report by itself why the rendezvous failed."""


@dataclass
class World:
    """The ranks of this job as one of them sees them.

    `control` is a gloo group for host-side values (None for a single rank), `heartbeat` shows the agent what this rank
    is doing, `timeout` limits every exchange, and `local_size` is the number of ranks on each node.
    """

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
        """Whether this is rank 0, which writes the files that have one writer."""
        return self.rank == 0

    def all_gather(self, values: Tensor) -> Tensor:
        """Stack every rank's CPU tensor (of one shape and dtype) in rank order: `[size, *values.shape]`."""
        if self.control is None:
            return values.unsqueeze(0)
        out = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(out, values.contiguous(), group=self.control)
        return torch.stack(out)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum a tensor on this rank's device over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Take the largest of each element over all ranks, of a tensor on this rank's device, in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def all_gather_json(self, value: Any) -> list[Any]:
        """Return every rank's JSON value, in rank order."""
        if self.control is None:
            return [value]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor(payload.numel()))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: payload.numel()] = payload
        rows = self.all_gather(padded)
        return [json.loads(bytes(row[: int(size)].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def with_own_control_group(self) -> World:
        """Return the same ranks with a new control group, for exchanges in another thread. All ranks must call it."""
        if self.control is None:
            return self
        return replace(self, control=dist.new_group(backend="gloo", timeout=self.timeout))

    def node_world(self) -> World:
        """Return the ranks of this node as a world, numbered by local rank. All ranks must call it."""
        if self.local_size == self.size:
            return self.with_own_control_group()
        control = None
        if self.local_size > 1:
            first = self.rank - self.local_rank
            ranks = list(range(first, first + self.local_size))
            control = dist.new_group(ranks, backend="gloo", timeout=self.timeout, use_local_synchronization=True)
        return replace(self, rank=self.local_rank, size=self.local_size, control=control)

    def barrier(self) -> None:
        """Wait for all ranks, at most launch.timeout_s."""
        if self.control is not None:
            dist.barrier(group=self.control)


class StoppedWhileJoining(Exception):
    """A signal asked this rank to stop before it had joined the others."""


def join(
    config: LaunchConfig,
    environment: RankEnvironment,
    heartbeat: Heartbeat | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> World:
    """Join the other ranks' process group, and return the ranks as this one sees them.

    From then on every process group of this process waits `launch.timeout_s` at most, also those that torch and
    DeepSpeed make.

    Raises:
        EnvironmentFault: there is no device for this rank, or a peer cannot be reached within `launch.timeout_s`.
        StoppedWhileJoining: `stopped` returned true meanwhile.
    """
    device = device_of_rank(config, environment)
    timeout = datetime.timedelta(seconds=config.timeout_s)
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout  # of groups that are made without one
    if device.type == "cuda":
        torch.cuda.set_device(device)
        stay_near(device)
    if environment.world_size == 1:  # needs no rendezvous and no network
        _join_alone(device, timeout)
        control = None
    else:
        _check_loopback(environment)
        try:
            control = _within(timeout, stopped, lambda: _connect(device, environment, timeout))
        except (dist.DistError, RuntimeError, TimeoutError, ValueError) as error:
            others = environment.world_size - 1
            raise EnvironmentFault(
                f"rank {environment.rank} could not join the other {f'{others} ranks' if others > 1 else 'rank'} at "
                f"{environment.master_addr}:{environment.master_port} within {config.timeout_s:g} s "
                f"(launch.timeout_s): {error}"
            ) from error
    place = environment.rank, environment.world_size, environment.local_rank
    return World(*place, device, control, heartbeat or Heartbeat(), timeout, environment.local_world_size)


def _check_loopback(environment: RankEnvironment) -> None:
    """Raise EnvironmentFault if the ranks of this node are to meet on loopback and it is down or missing.

    A container or a network namespace may be without it. torch would try to connect until the time limit.
    """
    if environment.master_addr not in ("127.0.0.1", "localhost"):
        return
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=10.0).close()
    except OSError as error:
        raise EnvironmentFault(
            f"the ranks on this node cannot reach each other at 127.0.0.1 ({error.strerror or error}): there is no "
            "loopback interface, or it is down. Bring it up (ip link set lo up), or train with launch.nproc_per_node=1"
        ) from error


def _join_alone(device: torch.device, timeout: datetime.timedelta) -> None:
    """Make the process group of a single rank.

    Gloo asks for a network interface even so. Where there is none, not even loopback, torch's fake process group takes
    its place: its collectives of one rank copy their input, as gloo's do.
    """
    try:
        dist.init_process_group(_backend(device), store=HashStore(), rank=0, world_size=1, timeout=timeout)
    except RuntimeError as error:
        if "Unable to find" not in str(error):
            raise
        from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers the backend)

        dist.init_process_group("fake", store=HashStore(), rank=0, world_size=1, timeout=timeout)


def _connect(device: torch.device, environment: RankEnvironment, timeout: datetime.timedelta) -> dist.ProcessGroup:
    """Connect to the other ranks at the address set by the launcher, and return the control group."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the current device is a thread's own
    place = environment.rank, environment.world_size
    store = next(rendezvous("env://", *place, timeout=timeout))[0]
    store.set_timeout(timeout)
    dist.init_process_group(
        _backend(device), store=store, rank=environment.rank, world_size=environment.world_size, timeout=timeout
    )
    control: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return control


def _within(timeout: datetime.timedelta, stopped: Callable[[], bool], work: Callable[[], T]) -> T:
    """Return what `work` returns or raise what it raises.

    It runs in a thread: while torch waits for other ranks, Python runs no signal handlers, and torch waits for ever if
    another program on the rendezvous port accepts and never answers.

    Raises:
        TimeoutError: `work` takes longer than `timeout` and a grace period.
        StoppedWhileJoining: `stopped` returned true meanwhile.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # any error is raised in the waiting thread
            found.set_exception(error)

    threading.Thread(target=run, name="rendezvous", daemon=True).start()
    deadline = time.monotonic() + timeout.total_seconds() + RENDEZVOUS_GRACE_S
    while not found.done():
        if stopped():
            raise StoppedWhileJoining
        if time.monotonic() > deadline:
            raise TimeoutError("no answer; another program may have this port")
        wait([found], timeout=0.05)
    return found.result()


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"

"""Check versions, devices, an all-reduce, the disk and the tracking server before a job trains.

Each problem is reported with its node and rank. The checks run when a job starts, but not when its ranks restart.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatrain
from megatrain.checkpoint.naming import list_checkpoints
from megatrain.config import TrainConfig
from megatrain.distributed.world import World
from megatrain.errors import EnvironmentFault
from megatrain.model.count import parameter_shapes
from megatrain.optim.slots import slot_bytes
from megatrain.tracking.mlflow import tracking_uri, without_password
from megatrain.tracking.mlflow_store import store_problem

ELEMENTS = 2**20
"""Elements of the all-reduce: 4 MiB takes milliseconds and is enough to tell a network from the loopback interface."""

REPEATS = 3
SERVER_S = 2.0
"""Seconds to wait for the tracking server's answer."""

_LOG = logging.getLogger("megatrain")


def preflight(config: TrainConfig, run_dir: Path, world: World) -> dict[str, Any]:
    """Run all checks on all ranks and return the measurements for events.jsonl.

    Raises:
        EnvironmentFault: on every rank, if any check fails; the message names the host and rank of each problem.
    """
    started = time.perf_counter()
    _all_well(world, lambda: check_versions(world, config.engine.name))
    _all_well(world, lambda: check_device(world))
    seconds = check_all_reduce(world)
    _all_well(world, lambda: check_disk(config, run_dir, world) if world.local_rank == 0 else None)
    if world.is_main and config.tracking.name == "mlflow":
        check_server(tracking_uri(run_dir.parent), config.tracking.experiment)
    size = ELEMENTS * 4
    found = {
        "nodes": world.size // world.local_size,
        "ranks": world.size,
        "seconds": round(time.perf_counter() - started, 4),
        "all_reduce_s": round(seconds, 6),
        "all_reduce_bytes": size,
        "all_reduce_gb_per_s": round(2 * (world.size - 1) / world.size * size / seconds / 1e9, 3),
    }
    _LOG.info("preflight: %s", found)
    return found


def _all_well(world: World, check: Callable[[], str | None]) -> None:
    """If any rank's check reports a problem, raise EnvironmentFault on every rank."""
    answers = world.all_gather_json([socket.gethostname(), check()])
    if wrong := [f"{host}, rank {rank}: {problem}" for rank, (host, problem) in enumerate(answers) if problem]:
        more = f"; and {len(wrong) - 8} more ranks" if len(wrong) > 8 else ""
        raise EnvironmentFault(f"preflight: {'; '.join(wrong[:8])}{more} (launch.preflight=false skips this)")


def versions(engine: str) -> dict[str, str]:
    """Return the versions that must be the same on all nodes, without importing DeepSpeed."""
    found = {
        "python": platform.python_version().rpartition(".")[0],
        "megatrain": megatrain.__version__,
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
    }
    if engine == "deepspeed":
        found["deepspeed"] = metadata.version("deepspeed")
    if torch.version.cuda and dist.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def check_versions(world: World, engine: str) -> str | None:
    """Return a description of the versions that differ from rank 0's; None if all are equal."""
    mine = versions(engine)
    first = world.all_gather_json(mine)[0]
    names = [name for name in {**first, **mine} if mine.get(name) != first.get(name)]
    return "; ".join(f"{name} {mine.get(name)}, but {first.get(name)} on rank 0" for name in names) or None


def check_device(world: World) -> str | None:
    """Return a description of the problem if the device computes a wrong sum; else None."""
    total = float(_ones(world).sum())
    return None if total == ELEMENTS else f"{world.device} adds {ELEMENTS} ones to {total:.0f}: a broken device"


def check_all_reduce(world: World) -> float:
    """Time `REPEATS` all-reduces on the training device and return the seconds of the fastest.

    Raises:
        EnvironmentFault: on every rank, if any rank got a wrong sum.
    """
    best = float("inf")
    for _ in range(REPEATS):
        values = _ones(world) * _addend(world.rank)
        world.barrier()
        started = time.perf_counter()
        world.all_reduce_sum(values)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    expected = sum(map(_addend, range(world.size)))
    wrong = int((values != expected).sum())
    _all_well(world, lambda: f"{wrong} of {ELEMENTS} sums of an all-reduce are wrong" if wrong else None)
    return best


def _addend(rank: int) -> int:
    """Return a rank's value in the all-reduce: small, so that the fp32 sum over thousands of ranks is exact."""
    return rank % 64 + 1


def _ones(world: World) -> torch.Tensor:
    return torch.ones(ELEMENTS, device=world.device)


def check_disk(config: TrainConfig, run_dir: Path, world: World) -> str | None:
    """Return a problem with the run's folder (cannot be written or read, no space for checkpoints), or None."""
    probe = run_dir / f".preflight-{socket.gethostname()}-{world.rank}"
    content = os.urandom(4096)
    try:
        with probe.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if probe.read_bytes() != content:
            return f"{run_dir} does not give back what was written to it"
        checkpoints = run_dir / "checkpoints"
        free = shutil.disk_usage(checkpoints if checkpoints.exists() else run_dir).free
    except OSError as error:
        return f"{run_dir} cannot be used: {error.strerror}"
    finally:
        with suppress(OSError):
            probe.unlink()
    one = sum(  # fp32 masters and the optimizer's states
        math.prod(shape) * (4 + slot_bytes(config.optim, name, shape))
        for name, shape in parameter_shapes(config.model).items()
    )
    existing = sum(1 for path in list_checkpoints(run_dir / "checkpoints") if (path / "manifest.json").exists())
    missing = max(1, config.checkpoint.keep + 1 - existing)  # a checkpoint is written before the oldest is removed
    if free < missing * one:
        return (
            f"{run_dir} has {_size(free)} left but needs space for {missing} more checkpoints of {_size(one)}; free "
            f"space, lower checkpoint.keep={config.checkpoint.keep}, or set run.dir to another disk"
        )
    return None


def _size(num_bytes: int) -> str:
    """Return a number of bytes in the largest unit of which it has one."""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((f"{num_bytes / one:.1f} {unit}" for unit, one in units if num_bytes >= one), f"{num_bytes} bytes")


def check_server(uri: str, experiment: str) -> None:
    """Warn if MLflow cannot use the address, or if it does not answer within `SERVER_S`. Training does not need it."""
    problem: list[str | None] = [f"does not answer (no answer within {SERVER_S:g} s)"]

    def ask() -> None:
        problem[0] = store_problem(uri, experiment, SERVER_S)

    asking = threading.Thread(target=ask, daemon=True)  # DNS and a slowly sent answer have no time limit
    asking.start()
    asking.join(SERVER_S)
    if problem[0] is not None:
        _LOG.warning(
            "MLflow at %s %s. Training goes on; records are sent once MLflow can take them",
            without_password(uri),
            problem[0],
        )

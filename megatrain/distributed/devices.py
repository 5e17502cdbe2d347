"""Choose devices, and look up their peak speed. The figures are the makers' dense peaks, without sparsity."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch

from megatrain.config import LaunchConfig
from megatrain.distributed import visible_gpus
from megatrain.distributed.rank_environment import RankEnvironment
from megatrain.errors import EnvironmentFault

_LOG = logging.getLogger("megatrain")

PCI_DEVICES = Path("/sys/bus/pci/devices")

PEAK_TFLOPS = {
    # from the makers' data sheets: name as CUDA reports it -> (bf16 and fp16 tensor cores, fp32)
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "GH200": (989.0, 67.0),
    "B200": (2250.0, 75.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 35.0),
    "V100": (125.0, 15.7),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in a precision, or None where it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    matches = [key for key in PEAK_TFLOPS if key in name]
    if not matches:
        return None
    half, single = PEAK_TFLOPS[max(matches, key=len)]
    return (single if precision == "fp32" else half) * 1e12


def device_of_rank(config: LaunchConfig, environment: RankEnvironment) -> torch.device:
    """Return the device of a training rank: one CUDA device for each local rank, or the CPU for all of them.

    Raises:
        EnvironmentFault: CUDA is requested (or `auto` finds any), but there are fewer devices than local ranks.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu" or (config.device == "auto" and not available):
        return torch.device("cpu")
    if available < environment.local_world_size:
        raise EnvironmentFault(
            visible_gpus.too_few(
                f"launch.device={config.device}",
                environment.local_world_size,
                socket.gethostname(),
                _limit(available),
            )
        )
    return torch.device("cuda", environment.local_rank)


def stay_near(device: torch.device) -> None:
    """Let this thread, and those that it starts later, run only on the cores of the GPU's NUMA node (Linux).

    A copy between the GPU and memory of another node takes a detour. Of the cores that this process may use at all,
    those near the GPU are kept; nothing changes if there are none, or if the system does not tell.
    """
    if device.type != "cuda" or not hasattr(os, "sched_setaffinity"):
        return
    gpu: Any = torch.cuda.get_device_properties(device)  # its stub lacks the PCI address
    if not hasattr(gpu, "pci_bus_id"):
        return
    near = near_cores(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")
    chosen = near & os.sched_getaffinity(0)
    if chosen and chosen != os.sched_getaffinity(0):
        os.sched_setaffinity(0, chosen)
        _LOG.info("%s: runs on the %d cores near it", device, len(chosen))


def near_cores(address: str) -> set[int]:
    """Return the cores of the NUMA node of a PCI device, such as `0000:3b:00.0`; empty if the system does not tell."""
    try:
        text = (PCI_DEVICES / address / "local_cpulist").read_text().strip()
    except OSError:
        return set()
    ranges = [part.partition("-") for part in text.split(",") if part]
    return {core for low, _, high in ranges for core in range(int(low), int(high or low) + 1)}


def device_by_name(name: str) -> torch.device:
    """Return the device for `device=cpu`, `cuda` or `auto` in a verb that runs as one process.

    Raises:
        EnvironmentFault: `cuda` is requested and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        found = _limit(0)
        raise EnvironmentFault(
            f"device=cuda: no GPU can be used here: {found.reason}; {found.remedy}, or give device=cpu or device=auto"
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _limit(available: int) -> visible_gpus.Limit:
    """Return why CUDA shows only `available` GPUs: as the system tells it, or else in the words of torch."""
    found = visible_gpus.limit()
    if found is not None and found.most <= available:
        return found
    reason, remedy = "CUDA shows no more", "look at nvidia-smi"
    if not available:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().partition("\n")[0].partition(". ")[0]
    return visible_gpus.Limit(available, reason, remedy)

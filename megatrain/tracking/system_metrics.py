"""The machine's load: CPU, memory, disk, network and GPUs. Imports no torch.

Names follow MLflow's own system metrics, so its page shows them. GPUs are read through nvidia-smi, which comes with
every NVIDIA driver, so the sampling process holds no CUDA context.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import psutil

MEGABYTE = 1e6


class SystemMetrics:
    """A sampler of this machine and of the memory of process `pid` (the trainer of rank 0)."""

    def __init__(self, pid: int, folder: Path) -> None:
        self._folder = folder
        self._pid = pid
        self._network = psutil.net_io_counters()
        self._has_gpu = shutil.which("nvidia-smi") is not None
        psutil.cpu_percent()  # the first call only starts the measuring interval

    def sample(self) -> dict[str, float]:
        """Return percentages of the whole machine, megabytes (1e6 bytes) and network traffic since the last sample."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(self._folder)), psutil.net_io_counters()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": (memory.total - memory.available) / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            "system/disk_usage_percentage": disk.percent,
            "system/disk_available_megabytes": disk.free / MEGABYTE,
        }
        if network is not None and self._network is not None:
            values["system/network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / MEGABYTE
            values["system/network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / MEGABYTE
        self._network = network
        with contextlib.suppress(psutil.NoSuchProcess):
            values["system/process_memory_megabytes"] = psutil.Process(self._pid).memory_info().rss / MEGABYTE
        return values | (self._gpus() if self._has_gpu else {})

    def _gpus(self) -> dict[str, float]:
        fields = ("utilization.gpu", "memory.used", "power.draw", "temperature.gpu")
        command = ["nvidia-smi", f"--query-gpu=index,{','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            self._has_gpu = False  # after one hang or failure the driver is not queried again
            return {}
        return parse_gpus(answer)


def parse_gpus(answer: str) -> dict[str, float]:
    """Parse nvidia-smi's comma-separated rows of index, utilisation in percent, MiB used, watts, degrees Celsius."""
    names = ("utilization_percentage", "memory_usage_megabytes", "power_usage_watts", "temperature_celsius")
    units = (1.0, 1.048576, 1.0, 1.0)
    values = {}
    for row in answer.strip().splitlines():
        index, *cells = [cell.strip() for cell in row.split(",")]
        for name, unit, cell in zip(names, units, cells, strict=True):
            try:
                values[f"system/gpu_{index}_{name}"] = float(cell) * unit
            except ValueError:
                continue  # "[N/A]": the device does not report it
    return values

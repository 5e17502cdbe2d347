"""`engine.*`: the training engine and its offloading. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class EngineConfig:
    """The engine that owns parameters, gradients and optimizer states."""

    name: str = key("deepspeed", "training engine", choices=("deepspeed", "native"))
    offload: str = key(
        "none",
        "where master weights and optimizer states are kept and updated: none, on the device; cpu, in host "
        "memory; nvme, in engine.nvme_path (deepspeed only)",
        choices=("none", "cpu", "nvme"),
    )
    offload_parameters: bool = key(
        False,
        "keep parameters in host memory too and move them to the device block by block (engine.offload=cpu, ZeRO 3)",
    )
    nvme_path: str | None = key(
        None,
        "folder on a fast local disk for engine.offload=nvme; a save needs 12 bytes of memory for each parameter "
        "of a rank",
        path=True,
    )

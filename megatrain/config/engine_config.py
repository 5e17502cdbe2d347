"""`engine.*`: the engine that owns parameters, gradients and optimizer states. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class EngineConfig:
    """Who owns parameters, gradients and optimizer states."""

    name: str = key("deepspeed", "training engine", choices=("deepspeed", "native"))
    offload: str = key(
        "none",
        "where masters and optimizer states live, and the update runs, instead of on the device: cpu, the host's memory; "
        "nvme, engine.nvme_path (deepspeed)",
        choices=("none", "cpu", "nvme"),
    )
    offload_parameters: bool = key(
        False, "parameters live in the host's memory too, and come to the device block by block (cpu, ZeRO 3)"
    )
    nvme_path: str | None = key(
        None,
        "folder on a fast local disk that engine.offload=nvme swaps to; a save takes 12 bytes a parameter of a rank in memory",
    )

"""`checkpoint.*`: when to save, what to keep, where to start from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class CheckpointConfig:
    """When to save, what to keep, where to start from."""

    every: int = key(100, "steps between saves; 0 saves only at the end and on a signal", minimum=0)
    keep: int = key(2, "number of newest checkpoints to keep; 0 keeps all", minimum=0)
    keep_every: int = key(0, "steps between milestones, checkpoints that are never deleted; 0 has none", minimum=0)
    resume: str = key(
        "auto",
        "auto resumes from the newest valid checkpoint in the run folder, never starts from scratch, a path "
        "resumes from that checkpoint",
        path=True,
    )
    init_from: str | None = key(
        None,
        "checkpoint to start a new run from: its weights, and its model as the default of model.*",
        path=True,
    )
    override: list[str] = key(
        [],
        "keys that may differ, on purpose, from the checkpoint that the run continues (optim.lr) or starts from "
        "(model.num_layers, or the word tokenizer)",
    )
    background: bool = key(
        True, "write during training, from a copy in host memory (12 bytes for each parameter that a rank holds)"
    )
    retries: int = key(5, "consecutive failed writes to tolerate; one more ends the run", minimum=0)
    retry_wait_s: float = key(30.0, "seconds before a failed write is retried", minimum=0, maximum=1e7)
    memory_every: int | None = key(
        None,
        "steps between copies of the state in memory that outlives the ranks (24 bytes for each parameter that "
        "the node holds, 16 with moments in bf16, twice that on several nodes); 0 makes none; null means 10 on "
        "GPUs and 0 on CPUs",
        minimum=0,
    )

    def copies_every(self, on_gpu: bool) -> int:
        """Return `memory_every`, or its default for the device."""
        return self.memory_every if self.memory_every is not None else 10 * on_gpu

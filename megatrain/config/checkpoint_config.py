"""`checkpoint.*`: when to save, what to keep, where to start from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class CheckpointConfig:
    """When to save, what to keep, where to start."""

    every: int = key(100, "steps between saves; 0 saves only at the end and on a signal", minimum=0)
    keep: int = key(2, "newest checkpoints to retain; 0 keeps all", minimum=0)
    keep_every: int = key(0, "every so many steps a checkpoint is a milestone, never retired; 0 has none", minimum=0)
    resume: str = key(
        "auto",
        "auto continues the run folder's newest valid checkpoint, never starts anew, a path continues that checkpoint",
    )
    init_from: str | None = key(None, "a checkpoint whose weights alone start a new run")
    background: bool = key(
        True, "write while training goes on, from a copy in host memory (12 bytes a parameter that a rank holds)"
    )
    retries: int = key(5, "failed writes in a row after which the run ends; the next one ends it", minimum=0)
    retry_wait_s: float = key(30.0, "seconds until a failed write is tried again", minimum=0, maximum=1e7)
    memory_every: int | None = key(
        None,
        "steps between copies of the state in memory that survives the ranks (24 bytes a parameter that the node holds, 16 with moments in bf16, "
        "twice that on several nodes); 0 makes none; null means 10 on GPUs and 0 on CPUs",
        minimum=0,
    )

    def copies_every(self, on_gpu: bool) -> int:
        """`memory_every` with its default."""
        return self.memory_every if self.memory_every is not None else 10 * on_gpu

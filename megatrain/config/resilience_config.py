"""`resilience.*`: restarts, hangs, loss spikes, slow ranks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key

GPU_HANG_TIMEOUT_S, CPU_HANG_TIMEOUT_S = 120.0, 600.0


@dataclass
class ResilienceConfig:
    """What happens when something fails."""

    max_restarts: int = key(
        100, "times that ranks which were killed or hang are started again inside a job; 0 never", minimum=0
    )
    hang_timeout_s: float | None = key(
        None,
        f"seconds in which no rank moves that count as a hang; null means {GPU_HANG_TIMEOUT_S:g} on GPUs and "
        f"{CPU_HANG_TIMEOUT_S:g} on CPUs. Until a start's first step is done launch.timeout_s counts instead, where that is "
        f"longer",
        above=0,
        maximum=1e7,
    )
    max_skipped: int = key(
        100,
        "steps in a row without a finite loss and gradient, which update nothing, after which the run is given up",
        minimum=1,
    )
    spike_zscore: float = key(
        12.0,
        "robust standard deviations above the median of recent losses from which a step's loss is a spike, and the run "
        "is rolled back; 0 never",
        minimum=0,
    )
    spike_window: int = key(128, "losses of recent steps that a loss is compared with", minimum=8)
    spike_skip_steps: int = key(
        8, "steps whose samples a rollback leaves out from then on, the spike's the last of them", minimum=1
    )
    max_rollbacks: int = key(
        3, "rollbacks without a checkpoint beyond the spike between them before the run is given up", minimum=0
    )
    slow_rank_ratio: float = key(
        1.2,
        "a rank whose own time of a step, without waiting for others, is so many times that of its like is named as slow; "
        "0 compares nothing",
        minimum=0,
    )

    def hang_timeout(self, on_gpu: bool) -> float:
        """Return `hang_timeout_s`, or its default for the device."""
        return self.hang_timeout_s or (GPU_HANG_TIMEOUT_S if on_gpu else CPU_HANG_TIMEOUT_S)

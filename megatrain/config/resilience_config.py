"""`resilience.*`: restarts, hangs, loss spikes, slow ranks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key

GPU_HANG_TIMEOUT_S, CPU_HANG_TIMEOUT_S = 120.0, 600.0


@dataclass
class ResilienceConfig:
    """The reaction to failures."""

    max_restarts: int = key(
        100, "restarts within a job of ranks that died, hung or raised; 0 never restarts", minimum=0
    )
    max_machine_restarts: int = key(
        10,
        "restarts within a job after errors of a device, its driver, the network or a disk, counted anew once a start "
        "continues from a later step; then the job ends with 8, for Slurm to start it on other nodes",
        minimum=0,
    )
    hang_timeout_s: float | None = key(
        None,
        f"seconds without progress on any rank that count as a hang; null means {GPU_HANG_TIMEOUT_S:g} on GPUs and "
        f"{CPU_HANG_TIMEOUT_S:g} on CPUs. Until the first step after a start is done, launch.timeout_s applies "
        f"if it is longer",
        minimum=1,
        maximum=1e7,
    )
    max_skipped: int = key(
        100,
        "consecutive steps with a non-finite loss or gradient (each is skipped) after which the run ends as diverged",
        minimum=1,
    )
    spike_zscore: float = key(
        12.0,
        "a loss this many robust standard deviations above the median of recent losses is a spike, and the run rolls "
        "back; 0 turns this off",
        minimum=0,
    )
    spike_window: int = key(128, "number of recent losses that a loss is compared with", minimum=8)
    spike_skip_steps: int = key(
        8, "steps, up to and including the spike, whose samples are skipped after a rollback", minimum=1
    )
    max_rollbacks: int = key(
        3,
        "rollbacks in a row, without a checkpoint past the spike in between, before the run ends as diverged",
        minimum=0,
    )
    slow_rank_ratio: float = key(
        1.2,
        "a rank is reported as slow if its own time per step, without waiting for others, is this many times that of "
        "comparable ranks; 0 turns this off",
        minimum=0,
    )

    def hang_timeout(self, on_gpu: bool) -> float:
        """Return `hang_timeout_s`, or its default for the device."""
        return self.hang_timeout_s or (GPU_HANG_TIMEOUT_S if on_gpu else CPU_HANG_TIMEOUT_S)

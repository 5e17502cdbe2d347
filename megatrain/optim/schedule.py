"""The learning rate and the batch size as pure functions of the step. Imports no torch.

Because nothing here has state, a resumed run, or one on another layout, gets the same values for the same step.
"""

from __future__ import annotations

import math

from megatrain.config import OptimConfig, TrainLoopConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of `step` (1-based) in a run of `total_steps`.

    Linear warm-up reaches the peak at `warmup_steps`. `cosine` (Loshchilov and Hutter, 2017) and `linear` then fall to
    `min_lr_ratio` of the peak at the last step; `constant` stays at the peak; `wsd` (warmup-stable-decay, Hu et al.,
    2024) stays at the peak until it falls linearly over the last `decay_fraction` of the run.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        decay_steps = min(total_steps - config.warmup_steps, max(1, round(total_steps * config.decay_fraction)))
        done = (step - (total_steps - decay_steps)) / max(1, decay_steps)
        return config.lr - (config.lr - floor) * min(1.0, max(0.0, done))
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    shape = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return floor + (config.lr - floor) * shape


def batch_size(config: TrainLoopConfig, step: int) -> int:
    """Return the number of sequences in `step` (1-based) over the whole job.

    With a ramp, the size rises from `batch_ramp_start` by `batch_ramp_increment` at equal intervals; from step
    `batch_ramp_steps + 1` on it is `global_batch_size` (a linear ramp, as in Brown et al., 2020).
    """
    if config.batch_ramp_start is None or step > config.batch_ramp_steps:
        return config.global_batch_size
    rises = math.ceil((config.global_batch_size - config.batch_ramp_start) / config.batch_ramp_increment)
    risen = (step - 1) * (rises + 1) // (config.batch_ramp_steps + 1)
    return min(config.global_batch_size, config.batch_ramp_start + risen * config.batch_ramp_increment)


def batch_sizes(config: TrainLoopConfig) -> list[int]:
    """Return all batch sizes that a run uses, in ascending order."""
    sizes = [config.global_batch_size]
    if config.batch_ramp_start is not None:
        sizes = sorted({batch_size(config, step) for step in range(1, config.batch_ramp_steps + 2)})
    return sizes


def samples_before(config: TrainLoopConfig, step: int) -> int:
    """Return the number of sequences in the steps before `step` (1-based)."""
    ramped = min(step - 1, config.batch_ramp_steps) if config.batch_ramp_start is not None else 0
    ramp = sum(batch_size(config, each) for each in range(1, ramped + 1))
    return ramp + (step - 1 - ramped) * config.global_batch_size

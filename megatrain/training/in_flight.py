"""The step that was submitted to the device and whose result the host has not read yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatrain.engine.protocol import SentResult


@dataclass(frozen=True)
class SubmittedStep:
    """A step that was submitted to the device.

    `result` is being copied to the host. `began` is the CUDA event recorded just before the step (None on a CPU).
    `cursor` and `batch_hash` belong to the step's batch. `data_time` and `save_time` are the seconds that the loop
    waited for that batch and for the save before the step, `metrics` what the batch has to record.
    """

    step: int
    lr: float
    began: Any
    result: SentResult
    cursor: int
    batch_hash: str
    data_time: float
    save_time: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class InFlight:
    """Holder of the submitted step, if any, whose result has not been read.

    On a GPU the host submits step n + 1 before it reads step n, so that the device never waits for the host. Between
    two iterations of the loop this object then holds step n. On a CPU, which reads each result at once, it is idle.
    """

    def __init__(self) -> None:
        self.held: SubmittedStep | None = None

    @property
    def is_idle(self) -> bool:
        """Whether all submitted steps have been read."""
        return self.held is None

    def hold(self, step: SubmittedStep) -> None:
        """Hold a step until its result is read."""
        assert self.held is None, "the step before must be read first"
        self.held = step

    def release(self) -> SubmittedStep | None:
        """Become idle and return the step that was held, if any."""
        held, self.held = self.held, None
        return held

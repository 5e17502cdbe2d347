"""The step between the device and the host: submitted, its result not read yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatrain.engine.protocol import SentResult


@dataclass(frozen=True)
class SubmittedStep:
    """A step that was handed to the device.

    `result` is on its way to the host. `began` is the CUDA event recorded when the step was submitted (None on a
    CPU); `cursor` and `batch_hash` belong to its batch; `data_time` and `save_time` are the seconds that the loop
    waited for the batch and for the save before the step.
    """

    step: int
    lr: float
    began: Any
    result: SentResult
    cursor: int
    batch_hash: str
    data_time: float
    save_time: float


class InFlight:
    """At most one submitted step whose result was not read.

    On a GPU the host submits step n + 1 before it reads step n, so that the device never waits for the host. Between
    two turns of the loop the object is therefore `waiting` (holding step n) or, where results are read at once,
    `idle`.
    """

    def __init__(self) -> None:
        self.held: SubmittedStep | None = None

    @property
    def is_idle(self) -> bool:
        """Whether every submitted step was read."""
        return self.held is None

    def hold(self, step: SubmittedStep) -> None:
        """Go from idle to waiting."""
        assert self.held is None, "the step before must be read first"
        self.held = step

    def release(self) -> SubmittedStep | None:
        """Go to idle; return the step that was waiting, if any."""
        held, self.held = self.held, None
        return held

"""The clock of a rank: on a CPU the host's, on a GPU CUDA events. Both pass signs of life on to the agent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatrain.engine.protocol import stamp
from megatrain.resilience.heartbeat import Heartbeat


class HostClock:
    """A CPU's: results are read at once, and waiting for other ranks is measured."""

    reads_late = False

    def __init__(self, heartbeat: Heartbeat, blocked_s: Callable[[], float]) -> None:
        self.enter = heartbeat.enter
        self.blocked_s = blocked_s

    def event(self) -> None:
        """Return None: the host's clock tells a step's time."""


class CudaClock:
    """A GPU's: results are read late, and a step's time is the time between two CUDA events."""

    reads_late = True

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.enter = heartbeat.enter

    def event(self) -> Any:
        """Record a CUDA event on the current stream."""
        return stamp()

    def blocked_s(self) -> float:
        """Return 0: on a GPU the host does not see its kernels wait."""
        return 0.0

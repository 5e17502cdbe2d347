"""Clocks that time the steps of a rank: the host's clock on a CPU, CUDA events on a GPU.

Both also report the current phase to the agent, through the heartbeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatrain.engine.protocol import stamp
from megatrain.resilience.heartbeat import Heartbeat


class HostClock:
    """Clock of a CPU: each result is read at once, and waits for other ranks are timed."""

    reads_late = False

    def __init__(self, heartbeat: Heartbeat, blocked_s: Callable[[], float]) -> None:
        self.enter = heartbeat.enter
        self.blocked_s = blocked_s

    def event(self) -> None:
        """Return None: steps are timed by the host's clock."""


class CudaClock:
    """Clock of a GPU: each result is read one step late, and steps are timed by CUDA events."""

    reads_late = True

    def __init__(self, heartbeat: Heartbeat) -> None:
        self.enter = heartbeat.enter

    def event(self) -> Any:
        """Record a CUDA event on the current stream."""
        return stamp()

    def blocked_s(self) -> float:
        """Return 0: the host cannot see how long kernels on a GPU wait."""
        return 0.0

"""Signals of a rank: the request to save and stop (SIGTERM, SIGUSR1), and the parent-death signal.

The trainer decides when to act on a request.
"""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A request to save and stop: the first of `STOP_SIGNALS`. Later ones are ignored, to leave a save undisturbed."""

    def __init__(self) -> None:
        self.signal_number = 0

    def listen(self) -> None:
        """Install the handlers (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        # Ctrl-C may reach the whole process group; the agent sends SIGTERM instead
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number

    def __bool__(self) -> bool:
        return self.signal_number != 0


def set_parent_death_signal(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send a signal to this process when its parent (process id `parent`) ends. Linux only."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def signal_name(number: int) -> str:
    """Return `SIGTERM` for 15 and so on, or `signal 99` for a number that is no signal."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

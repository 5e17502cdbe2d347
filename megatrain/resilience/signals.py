"""Signals of a rank: the request to save and stop (SIGTERM, SIGUSR1), and the parent-death signal.

The trainer decides when to act on a request.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from types import FrameType

PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """A request to save and stop: the first of `STOP_SIGNALS`. Later ones are ignored, to leave a save undisturbed.

    `asked_by` returns the signal that the agent got, if there is an agent: it forwards Ctrl-C as SIGTERM.
    """

    def __init__(self) -> None:
        self._received = 0
        self.asked_by: Callable[[], int] = lambda: 0

    @property
    def signal_number(self) -> int:
        """The signal that the user or the cluster sent; 0: none."""
        return (self.asked_by() or self._received) if self._received else 0

    def listen(self) -> None:
        """Install the handlers (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        # Ctrl-C may reach the whole process group; the agent sends SIGTERM instead
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self._received = self._received or number

    def __bool__(self) -> bool:
        return self._received != 0


def set_parent_death_signal(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send a signal to this process when its parent (process id `parent`) ends. Linux only."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)


def signal_name(number: int) -> str:
    """Return `SIGTERM` for 15 and so on, `Ctrl-C (SIGINT)` for 2, or `signal 99` for a number that is no signal."""
    if number == signal.SIGINT:
        return "Ctrl-C (SIGINT)"
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

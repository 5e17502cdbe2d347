"""SIGTERM and SIGUSR1 ask a run to save and leave. This only remembers that they came; the trainer decides when."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Set by the first of `STOP_SIGNALS`; further ones change nothing, so that a save under way is not broken."""

    def __init__(self) -> None:
        self.signal_number = 0

    def listen(self) -> None:
        """Install the handlers (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; our agent turns it into SIGTERM

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = self.signal_number or number

    def __bool__(self) -> bool:
        return self.signal_number != 0

"""Where each rank of a node is, in memory that its agent can read whatever state the rank is in. Imports no torch.

A record of 64 bytes a local rank in a file without a name that both map: writing one costs about a microsecond, a rank
that is stopped, stuck or dead leaves the last place it reached, and the file is gone with the last who maps it. Times are
of the monotonic clock, which all processes of a machine share and no one can set.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass

PHASES = ("start", "load", "data", "exchange", "forward", "backward", "update", "evaluate", "save", "end")
"""What a rank can be doing. `start` reaches to the first step's batch: imports, rendezvous, building the model."""

ENVIRONMENT = "MEGATRAIN_HEARTBEATS"
"""The number of the open file that a worker inherits from its agent."""

_RECORD = struct.Struct("<qqqq")  # step, steps finished by this process, nanoseconds, phase
_SIZE = 64


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life: its optimizer step (1-based; 0 before the first), how many it has finished since it
    was started, its phase, and the seconds since."""

    step: int
    finished: int
    phase: str
    age_s: float


class Heartbeat:
    """A rank's own record. Without an agent (somebody's torchrun, a test) it goes nowhere."""

    def __init__(self, file: int | None = None, local_rank: int = 0) -> None:
        self._map = mmap.mmap(file, 0) if file is not None else None
        self._offset = local_rank * _SIZE
        self.step, self.finished, self.phase = 0, 0, "start"

    @classmethod
    def from_environ(cls, local_rank: int, environ: Mapping[str, str] | None = None) -> Heartbeat:
        """The record that this process's agent reads, if it has an agent."""
        number = (os.environ if environ is None else environ).get(ENVIRONMENT)
        return cls(int(number) if number else None, local_rank)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say that this rank lives, and where it is now."""
        if step is not None and step != self.step:
            self.finished += self.step > 0
            self.step = step
        self.phase = phase
        self.beat()

    def beat(self) -> None:
        """Say that this rank lives."""
        if self._map is not None:
            record = (self.step, self.finished, time.monotonic_ns(), PHASES.index(self.phase))
            _RECORD.pack_into(self._map, self._offset, *record)


class Heartbeats:
    """The agent's end: one file for all local ranks, cleared for each start of theirs."""

    def __init__(self, num_ranks: int) -> None:
        memory = "/dev/shm"
        self._file = tempfile.TemporaryFile(dir=memory if os.access(memory, os.W_OK) else None)  # noqa: SIM115
        self._file.truncate(num_ranks * _SIZE)
        self._map = mmap.mmap(self.file, 0)
        self.num_ranks = num_ranks
        self.clear()

    @property
    def file(self) -> int:
        """The file's number, for the workers to inherit."""
        return self._file.fileno()

    def clear(self) -> None:
        """Every rank is starting now."""
        for rank in range(self.num_ranks):
            _RECORD.pack_into(self._map, rank * _SIZE, 0, 0, time.monotonic_ns(), 0)

    def read(self, local_rank: int) -> Beat:
        """A rank's last sign of life."""
        step, finished, when, phase = _RECORD.unpack_from(self._map, local_rank * _SIZE)
        return Beat(step, finished, PHASES[phase], (time.monotonic_ns() - when) / 1e9)

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
        self._file.close()

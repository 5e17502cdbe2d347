"""Heartbeats: which step and phase each rank of a node is in, and how its time was spent. Imports no torch.

Each local rank has a record in an unnamed file that the rank and its agent map into memory. Writing one takes a few
microseconds, in which a busy machine may well suspend the rank. So a record has two slots: the rank writes the one that
is not current, and then makes it current by one byte. The last record of a rank that is stopped, stuck or dead stays
readable. A rank that ends with an error leaves a report of it beside the record, which needs no disk. One that ends
well says so in its record, or its exit code does not count. The file vanishes with the last process that maps it. Times
are from the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

PHASES = ("start", "load", "data", "exchange", "forward", "backward", "update", "evaluate", "save", "end")
"""What a rank can be doing. `start` lasts until the first step's batch: imports, rendezvous, building the model."""

WAITED = "waited"
"""Name of a further account: the part of forward, backward and update spent waiting for other ranks."""

ENVIRONMENT = "MEGATRAIN_HEARTBEATS"
"""Environment variable with the file descriptor that a worker inherits from its agent."""

_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}
_COMPUTING = frozenset(_NUMBERS[phase] for phase in ("forward", "backward", "update"))
_AFTER_A_STEP = ("data", "save", "end")
_ACCOUNTS = len(PHASES) + 1  # each phase, and the time waited
_PLACE = ("step", "finished", "when", "phase", "first", "done")
_RECORD = struct.Struct(f"@{len(_PLACE)}q{_ACCOUNTS}q{_ACCOUNTS}q")  # packing it clears its bytes first
_SIZE = 512
_SLOTS = (32, 272)
"""Where a rank's two slots begin, after the byte that counts its writes; its lowest bit names the current slot."""
_END = 1
"""Where a rank says that it ends well: its exit code + 1, or 0."""
_ASKED = 2
"""Where the agent says which signal it got and forwards to the rank, perhaps as another one; 0: none."""
_REPORT_SIZE = 16384
_LENGTH = struct.Struct("@q")


@dataclass(frozen=True)
class Beat:
    """A rank's last heartbeat: its optimizer step (1-based; 0 before the first), the number of steps finished since its
    start, its phase, and the heartbeat's age in seconds."""

    step: int
    finished: int
    phase: str
    age_s: float


@dataclass(frozen=True)
class Account:
    """How a rank's time since its start was spent.

    `seconds` holds the time by phase, which adds up to the time since the start, and `waited`, which the phases
    include. `unfinished` is the part of `seconds` since the last finished step. `first` is the first step the rank
    began (0: none yet), `done` the last it finished (0: none), and `finished` the number it finished, counting again
    those repeated after a rollback.
    """

    first: int
    done: int
    finished: int
    seconds: dict[str, float]
    unfinished: dict[str, float]


class Listener(Protocol):
    """An observer in the rank's process that is told of its phases and waits, such as a profiler."""

    def enter(self, phase: str, step: int) -> None:
        """Note that a phase of a step begins."""

    def waited(self, nanoseconds: int) -> None:
        """Note a wait of this many nanoseconds for other ranks."""


class Heartbeat:
    """A rank's own record, written nowhere if there is no agent (under torchrun, in a test)."""

    def __init__(self, file: int | None = None, local_rank: int = 0) -> None:
        self._map = mmap.mmap(file, 0) if file is not None else None
        self._offset = local_rank * _SIZE
        num_ranks = len(self._map) // (_SIZE + _REPORT_SIZE) if self._map is not None else 0
        self._report_offset = num_ranks * _SIZE + local_rank * _REPORT_SIZE
        self.listener: Listener | None = None
        self.step, self.finished, self.phase = 0, 0, "start"
        self._first = self._done = 0
        self._updates = False
        self._spent = [0] * _ACCOUNTS
        self._spent_on_steps = [0] * _ACCOUNTS
        self._when = time.monotonic_ns()
        if self._map is not None:
            self._when = _current(self._map, self._offset)[2]  # when the agent began to start this rank

    @classmethod
    def from_environ(cls, local_rank: int, environ: Mapping[str, str] | None = None) -> Heartbeat:
        """Open the record that this process's agent reads, if there is an agent."""
        number = (os.environ if environ is None else environ).get(ENVIRONMENT)
        return cls(int(number) if number else None, local_rank)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Record that this rank is alive and enters a phase (of `step`, if given)."""
        self._book()
        if self._updates and phase in _AFTER_A_STEP:
            self._updates = False
            self.finished += 1
            self._done = self.step
            self._spent_on_steps = list(self._spent)
        if phase == "update":
            self._updates = True
        if step is not None:
            self.step = step
            if phase == "data" and not self._first:
                self._first = step
                self._spent_on_steps = list(self._spent)  # unfinished time begins with the first step
        self.phase = phase
        self._write()
        if self.listener is not None:
            self.listener.enter(phase, self.step)

    def beat(self) -> None:
        """Record that this rank is alive."""
        self._book()
        self._write()

    def waited(self, nanoseconds: int) -> None:
        """Record nanoseconds of the current phase as spent waiting for other ranks."""
        if _NUMBERS[self.phase] in _COMPUTING:
            self._spent[-1] += nanoseconds
        if self.listener is not None:
            self.listener.waited(nanoseconds)

    @property
    def has_agent(self) -> bool:
        """Whether an agent reads this record."""
        return self._map is not None

    def report(self, text: str) -> None:
        """Leave a report of the error that ends this rank for the agent. One that is too long is left out."""
        encoded = text.encode()
        if self._map is not None and len(encoded) <= _REPORT_SIZE - _LENGTH.size:
            start = self._report_offset + _LENGTH.size
            self._map[start : start + len(encoded)] = encoded
            _LENGTH.pack_into(self._map, self._report_offset, len(encoded))  # last: only a whole report is read

    def end(self, code: int) -> None:
        """Tell the agent that this rank ends well, with this exit code: it is done (0) or has saved (75)."""
        if self._map is not None:
            self._map[self._offset + _END] = code + 1

    @property
    def asked_by(self) -> int:
        """The signal by which the agent was asked to stop this rank; 0: none, or no agent."""
        return self._map[self._offset + _ASKED] if self._map is not None else 0

    def _book(self) -> None:
        now = time.monotonic_ns()
        self._spent[_NUMBERS[self.phase]] += now - self._when
        self._when = now

    def _write(self) -> None:
        if self._map is not None:
            place = (self.step, self.finished, self._when, _NUMBERS[self.phase], self._first, self._done)
            _replace(self._map, self._offset, *place, *self._spent, *self._spent_on_steps)


class Heartbeats:
    """The agent's side: one file for all local ranks, cleared before each start of the ranks."""

    def __init__(self, num_ranks: int) -> None:
        memory = "/dev/shm"
        self._file = tempfile.TemporaryFile(dir=memory if os.access(memory, os.W_OK) else None)  # noqa: SIM115
        self._file.truncate(num_ranks * (_SIZE + _REPORT_SIZE))
        self._map = mmap.mmap(self.file, 0)
        self.num_ranks = num_ranks
        self.clear()

    @property
    def file(self) -> int:
        """Return the file descriptor for the workers to inherit."""
        return self._file.fileno()

    def clear(self) -> None:
        """Reset all records: every rank starts now."""
        nothing = (0,) * (_ACCOUNTS * 2)
        for rank in range(self.num_ranks):
            _replace(self._map, rank * _SIZE, 0, 0, time.monotonic_ns(), 0, 0, 0, *nothing)
            _LENGTH.pack_into(self._map, self._report_offset(rank), 0)
            self._map[rank * _SIZE + _END] = self._map[rank * _SIZE + _ASKED] = 0

    def ask(self, number: int) -> None:
        """Tell all ranks which signal asks for their end; the first one stays."""
        for rank in range(self.num_ranks):
            self._map[rank * _SIZE + _ASKED] = self._map[rank * _SIZE + _ASKED] or number

    def read(self, local_rank: int) -> Beat:
        """Return a rank's last heartbeat."""
        step, finished, when, phase, *_ = _current(self._map, local_rank * _SIZE)
        return Beat(step, finished, PHASES[phase], (time.monotonic_ns() - when) / 1e9)

    def report(self, local_rank: int) -> str:
        """Return the report that a rank left, or an empty text."""
        (length,) = _LENGTH.unpack_from(self._map, self._report_offset(local_rank))
        start = self._report_offset(local_rank) + _LENGTH.size
        return bytes(self._map[start : start + length]).decode("utf-8", "replace")

    def ended(self, local_rank: int) -> int | None:
        """Return the exit code with which a rank says it ends well; None if it says nothing."""
        said = self._map[local_rank * _SIZE + _END]
        return said - 1 if said else None

    def _report_offset(self, local_rank: int) -> int:
        return self.num_ranks * _SIZE + local_rank * _REPORT_SIZE

    def account(self, local_rank: int, until: float | None = None) -> Account:
        """Return how a rank's time was spent until `until` (time.monotonic(), after its last heartbeat; None: now)."""
        record = _current(self._map, local_rank * _SIZE)
        _, finished, when, phase, first, done = record[: len(_PLACE)]
        spent = list(record[len(_PLACE) : -_ACCOUNTS])
        now = time.monotonic_ns() if until is None else int(until * 1e9)
        spent[phase] += max(0, now - when)
        names = (*PHASES, WAITED)
        seconds = {name: value / 1e9 for name, value in zip(names, spent, strict=True)}
        on_steps = {name: value / 1e9 for name, value in zip(names, record[-_ACCOUNTS:], strict=True)}
        return Account(first, done, finished, seconds, {name: seconds[name] - on_steps[name] for name in names})

    def close(self) -> None:
        """Unmap and close the file."""
        self._map.close()
        self._file.close()


def _replace(memory: mmap.mmap, offset: int, *numbers: int) -> None:
    """Write a record into the slot that is not current, and make it current."""
    writes = (memory[offset] + 1) % 256
    _RECORD.pack_into(memory, offset + _SLOTS[writes % 2], *numbers)
    memory[offset] = writes


def _current(memory: mmap.mmap, offset: int) -> tuple[int, ...]:
    """Return a whole record: read again if its slot was written meanwhile, which takes two writes."""
    while True:
        writes = memory[offset]
        record = _RECORD.unpack_from(memory, offset + _SLOTS[writes % 2])
        if memory[offset] == writes:
            return record

"""Where each rank of a node is and what its time went to, in memory that its agent can read whatever state the rank is in.
Imports no torch.

A record of 256 bytes a local rank in a file without a name that both map: writing one costs some microseconds, a rank
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
from typing import Protocol

PHASES = ("start", "load", "data", "exchange", "forward", "backward", "update", "evaluate", "save", "end")
"""What a rank can be doing. `start` reaches to the first step's batch: imports, rendezvous, building the model."""

WAITED = "waited"
"""Beside the phases, the part of forward, backward and update that was spent waiting for other ranks."""

ENVIRONMENT = "MEGATRAIN_HEARTBEATS"
"""The number of the open file that a worker inherits from its agent."""

_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}
_COMPUTING = frozenset(_NUMBERS[phase] for phase in ("forward", "backward", "update"))
_AFTER_A_STEP = ("data", "save", "end")
_ACCOUNTS = len(PHASES) + 1  # each phase, and what was waited
_PLACE = ("step", "finished", "when", "phase", "first", "done")
# of native 8-byte numbers, each of which is written at once
_RECORD = struct.Struct(f"@{len(_PLACE)}q{_ACCOUNTS}q{_ACCOUNTS}q")
_SIZE = 256


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life: its optimizer step (1-based; 0 before the first), how many it has finished since it
    was started, its phase, and the seconds since."""

    step: int
    finished: int
    phase: str
    age_s: float


@dataclass(frozen=True)
class Account:
    """What a rank's time since it was started went to, until now.

    `seconds` by phase, and `waited`, which is part of them; they add up to the time since the start. `unfinished` is the
    part of them since the last step that was finished. `first` is the first step it began (0: none yet), `done` the last
    it finished (0: none), `finished` how many, those it did again after a rollback included.
    """

    first: int
    done: int
    finished: int
    seconds: dict[str, float]
    unfinished: dict[str, float]


class Listener(Protocol):
    """Who wants to hear in this process, at once, what the heartbeat is told (a profile)."""

    def enter(self, phase: str, step: int) -> None:
        """A phase of a step begins."""

    def waited(self, nanoseconds: int) -> None:
        """So much of the phase was spent waiting for other ranks."""


class Heartbeat:
    """A rank's own record. Without an agent (somebody's torchrun, a test) it goes nowhere."""

    def __init__(self, file: int | None = None, local_rank: int = 0) -> None:
        self._map = mmap.mmap(file, 0) if file is not None else None
        self._offset = local_rank * _SIZE
        self.listener: Listener | None = None
        self.step, self.finished, self.phase = 0, 0, "start"
        self._first = self._done = 0
        self._updates = False
        self._spent = [0] * _ACCOUNTS
        self._spent_on_steps = [0] * _ACCOUNTS
        self._when = time.monotonic_ns()
        if self._map is not None:
            self._when = _RECORD.unpack_from(self._map, self._offset)[2]  # when the agent began to start this rank

    @classmethod
    def from_environ(cls, local_rank: int, environ: Mapping[str, str] | None = None) -> Heartbeat:
        """The record that this process's agent reads, if it has an agent."""
        number = (os.environ if environ is None else environ).get(ENVIRONMENT)
        return cls(int(number) if number else None, local_rank)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Say that this rank lives, and where it is now."""
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
                self._spent_on_steps = list(self._spent)  # so that what is unfinished begins with the step
        self.phase = phase
        self._write()
        if self.listener is not None:
            self.listener.enter(phase, self.step)

    def beat(self) -> None:
        """Say that this rank lives."""
        self._book()
        self._write()

    def waited(self, nanoseconds: int) -> None:
        """Take down that so much of this phase was spent waiting for other ranks."""
        if _NUMBERS[self.phase] in _COMPUTING:
            self._spent[-1] += nanoseconds
        if self.listener is not None:
            self.listener.waited(nanoseconds)

    def _book(self) -> None:
        now = time.monotonic_ns()
        self._spent[_NUMBERS[self.phase]] += now - self._when
        self._when = now

    def _write(self) -> None:
        if self._map is not None:
            place = (self.step, self.finished, self._when, _NUMBERS[self.phase], self._first, self._done)
            _RECORD.pack_into(self._map, self._offset, *place, *self._spent, *self._spent_on_steps)


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
        nothing = (0,) * (_ACCOUNTS * 2)
        for rank in range(self.num_ranks):
            _RECORD.pack_into(self._map, rank * _SIZE, 0, 0, time.monotonic_ns(), 0, 0, 0, *nothing)

    def read(self, local_rank: int) -> Beat:
        """A rank's last sign of life."""
        step, finished, when, phase, *_ = self._record(local_rank)
        return Beat(step, finished, PHASES[phase], (time.monotonic_ns() - when) / 1e9)

    def account(self, local_rank: int, until: float | None = None) -> Account:
        """What a rank's time went to until now, or until the moment `until` of time.monotonic(), which is not before its
        last sign of life."""
        record = self._record(local_rank)
        _, finished, when, phase, first, done = record[: len(_PLACE)]
        spent = list(record[len(_PLACE) : -_ACCOUNTS])
        now = time.monotonic_ns() if until is None else int(until * 1e9)
        spent[phase] += max(0, now - when)
        names = (*PHASES, WAITED)
        seconds = {name: value / 1e9 for name, value in zip(names, spent, strict=True)}
        on_steps = {name: value / 1e9 for name, value in zip(names, record[-_ACCOUNTS:], strict=True)}
        return Account(first, done, finished, seconds, {name: seconds[name] - on_steps[name] for name in names})

    def _record(self, local_rank: int) -> tuple[int, ...]:
        """A rank's record, which it may be writing at this moment."""
        record: tuple[int, ...] = ()
        for _ in range(8):
            again = _RECORD.unpack_from(self._map, local_rank * _SIZE)
            if again == record:
                break
            record = again
        return record

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
        self._file.close()

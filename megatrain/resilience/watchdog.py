"""Detect a hung job, and find the rank to blame. Runs in the agent; imports no torch.

The ranks of a job depend on each other: if one is stuck, all others soon wait for it. So a job hangs if no rank has
sent a heartbeat for a while. The culprit is the rank that does not answer, or the one that is not waiting for others.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.resilience.heartbeat import PHASES, Beat, Heartbeats

DUMP_SIGNAL = signal.SIGUSR2
"""Makes a worker dump the Python stacks of all its threads, whatever it is doing."""

ANSWER_S = 2.0
"""Seconds to wait for a rank to write its stacks."""

COLLECTIVES = re.compile(r'File "[^"]*(?:torch/distributed/|deepspeed/comm/)([^"]*)", line \d+ in (\w+)')
OURS = re.compile(r'File "[^"]*/(megatrain/[^"]*)", line (\d+) in (\w+)')
TIMING = "megatrain/distributed/waits.py"
"""Frames of this file wrap a wait to time it; they are ignored."""

_WRAPPERS = ("wrapper", "wait", "wait_tensor", "trigger_wait", "log_wrapper", "decorator")
"""Functions around a collective whose names say nothing about it."""

NEAR = 4
"""A rank waits for others if one of this many innermost frames is in torch's or DeepSpeed's communication code."""


@dataclass(frozen=True)
class Limits:
    """Seconds without a heartbeat until a job counts as hung.

    `training_s` applies while it trains; `starting_s` to what may take long: imports, rendezvous, loading and compiling
    until the first step is done, waiting for a save, and sending the trackers' backlog after the last step.
    """

    training_s: float
    starting_s: float

    def of(self, beat: Beat) -> float:
        """Return the limit for a rank in this state."""
        trains = beat.finished and beat.phase not in ("save", "end")
        return self.training_s if trains else max(self.starting_s, self.training_s)


@dataclass(frozen=True)
class Witness:
    """What a rank of a hung job was doing.

    `state` is Linux's letter for the process's state, `waits_in` the collective it waits in (None if in none), `at` the
    line of our code that called it, and `stacks` its dump (empty if it did not answer).
    """

    rank: int
    beat: Beat
    state: str
    waits_in: str | None
    at: str | None
    stacks: str

    @property
    def answered(self) -> bool:
        """Return whether the rank wrote its stacks."""
        return bool(self.stacks)

    def event(self) -> dict[str, Any]:
        """Return the fields of the event in events.jsonl."""
        return {
            "rank": self.rank,
            "phase": self.beat.phase,
            "silent_s": round(self.beat.age_s, 3),
            "state": self.state,
            "waits_in": self.waits_in,
            "at": self.at,
            "stacks": self.stacks,
        }

    def __str__(self) -> str:
        where = f"step {self.beat.step}, {self.beat.phase}"
        if not self.answered:
            doing = "is stopped (SIGSTOP)" if self.state in "Tt" else "does not answer"
        elif self.waits_in:
            doing = f"waits in {self.waits_in}"
        else:
            doing = "waits for no one"
        return f"rank {self.rank} ({where}) {doing}" + (f", called from {self.at}" if self.at else "")


def hangs(heartbeats: Heartbeats, ranks: Sequence[int], limits: Limits) -> bool:
    """Return whether all of these local ranks have been silent for longer than their limits; False without ranks."""
    beats = [heartbeats.read(rank) for rank in ranks]
    return bool(beats) and all(beat.age_s > limits.of(beat) for beat in beats)


@contextmanager
def answer_with_stacks(path: Path) -> Iterator[None]:
    """Have this worker write the stacks of all threads to `path` on DUMP_SIGNAL. Removes an empty file at the end."""
    with path.open("w") as file:
        faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True, chain=False)
        try:
            yield
        finally:
            faulthandler.unregister(DUMP_SIGNAL)
            if not _size(path):
                path.unlink(missing_ok=True)


def stack_file(run_dir: Path, rank: int) -> Path:
    """Return the file to which a rank writes its stacks."""
    return run_dir / "logs" / f"stacks_{rank:05d}.txt"


def collect_stacks(
    pids: Mapping[int, int], heartbeats: Heartbeats, stack_file: Mapping[int, Path], patience_s: float = ANSWER_S
) -> list[Witness]:
    """Have every rank (`pids` by local rank) write its stacks, and return what each was doing."""
    sizes = {rank: _size(stack_file[rank]) for rank in pids}
    for pid in pids.values():
        try:
            os.kill(pid, DUMP_SIGNAL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and any(_size(stack_file[rank]) <= sizes[rank] for rank in pids):
        time.sleep(0.05)
    time.sleep(0.1)  # a dump takes several writes
    witnesses = []
    for rank, pid in sorted(pids.items()):
        stacks = ""
        if _size(stack_file[rank]) > sizes[rank]:
            stacks = stack_file[rank].read_bytes()[sizes[rank] :].decode("utf-8", "replace")
        waits_in, at = read_stacks(stacks)
        witnesses.append(Witness(rank, heartbeats.read(rank), _state(pid), waits_in, at, stacks))
    return witnesses


def culprits(witnesses: Sequence[Witness]) -> list[Witness]:
    """Return the ranks that hold up the others.

    These are the ones that do not answer; if all answer, the ones that wait for no one; otherwise the ones furthest
    behind. Empty if all wait alike: then the network is to blame.
    """
    silent = [witness for witness in witnesses if not witness.answered]
    not_waiting = [witness for witness in witnesses if witness.waits_in is None]
    for guilty in (silent, not_waiting):
        if guilty and (len(guilty) < len(witnesses) or len(witnesses) == 1):
            return guilty
    # on GPUs no rank is seen waiting: the host runs ahead of the collective until it needs a result from the GPU
    none_waits = all(witness.waits_in is None for witness in witnesses)
    places = [(witness.beat.step, PHASES.index(witness.beat.phase) if none_waits else 0) for witness in witnesses]
    guilty = [witness for witness, place in zip(witnesses, places, strict=True) if place == min(places)]
    return guilty if len(guilty) < len(witnesses) else []


def read_stacks(stacks: str) -> tuple[str | None, str | None]:
    """Return the collective in which a faulthandler dump shows a thread waiting, and our line that called it."""
    waits_in = at = None
    for thread in re.split(r"\n\n|(?=^(?:Current thread|Thread) 0x)", stacks, flags=re.MULTILINE):
        lines = (line for line in thread.splitlines() if line.lstrip().startswith("File "))
        frames = [line for line in lines if TIMING not in line]
        near = [match for line in frames[:NEAR] if (match := COLLECTIVES.search(line))]
        ours = next((match for line in frames if (match := OURS.search(line))), None)
        if (near and ours is not None) or (near and waits_in is None):
            named = next((match for match in near if match[2] not in _WRAPPERS), near[0])
            waits_in = f"{named[2]} ({named[1]})"
        if ours is not None:
            at = f"{ours[1]}:{ours[2]} {ours[3]}"
    return waits_in, at


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _state(pid: int) -> str:
    """Return Linux's letter for a process's state: `T` stopped, `D` in the kernel, `S` asleep, `R` running, or `?`."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"

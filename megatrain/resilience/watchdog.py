"""Tells a job that hangs from one that works, and who holds the others up. Runs in the agent; imports no torch.

Ranks of a job are in step: one that is stuck soon leaves all others waiting for it. So a job hangs when no rank has given
a sign of life for a while, and the culprit is the one that does not answer, or the one that is not waiting for others.
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
"""Asks a worker for the Python stacks of all its threads, whatever it is doing."""

ANSWER_S = 2.0
"""Seconds a rank has to write its stacks."""

COLLECTIVES = re.compile(r'File "[^"]*(?:torch/distributed/|deepspeed/comm/)([^"]*)", line \d+ in (\w+)')
OURS = re.compile(r'File "[^"]*/(megatrain/[^"]*)", line (\d+) in (\w+)')
TIMING = "megatrain/distributed/waits.py"
"""What times a wait stands between the collective and the rank that waits in it, and tells nothing."""

_PASSED_ON = ("wrapper", "wait", "wait_tensor", "trigger_wait", "log_wrapper", "decorator")
"""Functions on the way to a collective whose names tell nothing."""

NEAR = 4
"""Frames from the innermost one in which a rank that waits for others shows torch's or DeepSpeed's communication."""


@dataclass(frozen=True)
class Limits:
    """Seconds without a sign of life until a job counts as hanging: while it trains, and where it may take long (imports,
    rendezvous, loading and compiling until a start's first step is done; the loop waiting for a save; what trackers still
    have to send after the last step)."""

    training_s: float
    starting_s: float

    def of(self, beat: Beat) -> float:
        """The limit for a rank in this state."""
        trains = beat.finished and beat.phase not in ("save", "end")
        return self.training_s if trains else max(self.starting_s, self.training_s)


@dataclass(frozen=True)
class Witness:
    """What a rank of a hanging job showed: `waits_in` is the collective it waits in, None if in none."""

    rank: int
    beat: Beat
    state: str
    waits_in: str | None
    at: str | None
    stacks: str

    @property
    def answered(self) -> bool:
        """Whether it still runs Python's signal handlers."""
        return bool(self.stacks)

    def event(self) -> dict[str, Any]:
        """What events.jsonl keeps of it."""
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
    """Whether none of these local ranks has given a sign of life within its limit."""
    beats = [heartbeats.read(rank) for rank in ranks]
    return bool(beats) and all(beat.age_s > limits.of(beat) for beat in beats)


@contextmanager
def answer_with_stacks(path: Path) -> Iterator[None]:
    """In a worker: write the stacks of all threads to `path` whenever the agent asks. A file that stayed empty goes."""
    with path.open("w") as file:
        faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True, chain=False)
        try:
            yield
        finally:
            faulthandler.unregister(DUMP_SIGNAL)
            if not _size(path):
                path.unlink(missing_ok=True)


def stack_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes its stacks when it is asked to."""
    return run_dir / "logs" / f"stacks_{rank:05d}.txt"


def collect_stacks(
    pids: Mapping[int, int], heartbeats: Heartbeats, stack_file: Mapping[int, Path], patience_s: float = ANSWER_S
) -> list[Witness]:
    """Have every rank (`pids` by local rank) write its stacks, and read off what each is waiting for."""
    sizes = {rank: _size(stack_file[rank]) for rank in pids}
    for pid in pids.values():
        try:
            os.kill(pid, DUMP_SIGNAL)
        except ProcessLookupError:
            continue
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and any(_size(stack_file[rank]) <= sizes[rank] for rank in pids):
        time.sleep(0.05)
    time.sleep(0.1)  # a dump is several writes
    witnesses = []
    for rank, pid in sorted(pids.items()):
        stacks = ""
        if _size(stack_file[rank]) > sizes[rank]:
            stacks = stack_file[rank].read_bytes()[sizes[rank] :].decode("utf-8", "replace")
        waits_in, at = read_stacks(stacks)
        witnesses.append(Witness(rank, heartbeats.read(rank), _state(pid), waits_in, at, stacks))
    return witnesses


def culprits(witnesses: Sequence[Witness]) -> list[Witness]:
    """Those that hold the others up: who does not answer, or else who waits for no one, or else who is furthest behind.
    Empty where all wait alike: then the network, or a rank of another node, is to blame."""
    for is_guilty in (lambda w: not w.answered, lambda w: w.waits_in is None):
        guilty = [witness for witness in witnesses if is_guilty(witness)]
        if guilty and (len(guilty) < len(witnesses) or len(witnesses) == 1):
            return guilty
    # on GPUs nobody is seen waiting: those who wait for others have gone on to where they need what the GPU computes
    unseen = all(witness.waits_in is None for witness in witnesses)
    places = [(witness.beat.step, PHASES.index(witness.beat.phase) if unseen else 0) for witness in witnesses]
    guilty = [witness for witness, place in zip(witnesses, places, strict=True) if place == min(places)]
    return guilty if len(guilty) < len(witnesses) else []


def read_stacks(stacks: str) -> tuple[str | None, str | None]:
    """The collective that a dump of faulthandler's shows some thread waiting in, and where our code called from."""
    waits_in = at = None
    for thread in re.split(r"\n\n|(?=^(?:Current thread|Thread) 0x)", stacks, flags=re.MULTILINE):
        lines = (line for line in thread.splitlines() if line.lstrip().startswith("File "))
        frames = [line for line in lines if TIMING not in line]
        near = [match for line in frames[:NEAR] if (match := COLLECTIVES.search(line))]
        ours = next((match for line in frames if (match := OURS.search(line))), None)
        if (near and ours is not None) or (near and waits_in is None):
            told = next((match for match in near if match[2] not in _PASSED_ON), near[0])
            waits_in = f"{told[2]} ({told[1]})"
        if ours is not None:
            at = f"{ours[1]}:{ours[2]} {ours[3]}"
    return waits_in, at


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _state(pid: int) -> str:
    """Linux's letter for what a process does (`T` stopped, `D` in the kernel, `S` asleep, `R` running); ? where unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"

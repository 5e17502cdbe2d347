"""The goodput ledger: how every second of a run was spent, across restarts and requeues. Imports no torch.

The agent keeps it in `runs/<name>/ledger.json` (`Ledger`). It has an entry per agent, which has an entry per start of
the ranks with rank 0's account of its time (`heartbeat.py`), updated every `EVERY_S` seconds. The totals and lost work
are computed when the ledger is read (`summarise`), because only later starts show which steps were repeated. Times
within an agent's life are from the monotonic clock; the wall clock only gives the time between two agents.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.errors import CheckpointError, ConfigError, DataError, OwnedError
from megatrain.resilience.atomic_file import replacing
from megatrain.resilience.heartbeat import WAITED, Account, Heartbeats
from megatrain.resilience.terminal import say

FILE = "ledger.json"

EVERY_S = 10.0
"""Seconds between two writes: the most that a power cut can cost the ledger."""

CATEGORIES = (
    "start-up",
    "load",
    "data",
    "compute",
    "communication",
    "evaluation",
    "save",
    "lost work",
    "downtime",
    "end",
    "idle",
)
"""How time is spent. `save` is the time that saves block the training loop; `lost work` went into steps that were
repeated or never finished; `downtime` lasts from a failure to the next start of the ranks, or from the end of a Slurm
job to its requeue; `idle` lasts from a run that was finished, saved or stopped by its user to the next command."""

EFFECTIVE = ("data", "compute", "communication")
"""Categories of effective training time, which exclude lost work."""

_PHASES = {
    "start": "start-up",
    "load": "load",
    "data": "data",
    "exchange": "communication",
    "forward": "compute",
    "backward": "compute",
    "update": "compute",
    "evaluate": "evaluation",
    "save": "save",
    "end": "end",
}
_REPEATED = (*EFFECTIVE, "evaluation")
"""Categories whose time is lost if a step is repeated."""

_GOOD_ENDS = ("done", "saved")
_NO_FAILURES = (*_GOOD_ENDS, "interrupted")
_REFUSED = tuple(f"exit code {error.exit_code}" for error in (ConfigError, DataError, CheckpointError, OwnedError))
"""How a start ends whose command was refused, if it began no step: a user's mistake, which costs no training."""

DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""Exceptions that reading and summarising a damaged ledger may raise."""


class Ledger:
    """Keeps the ledger for one agent. A failed write never stops the agent; the next one makes up for it."""

    def __init__(
        self, path: Path, heartbeats: Heartbeats, may_write: Callable[[], None], since: float | None = None
    ) -> None:
        """`since` is when this agent started (time.monotonic(); None means now). `may_write` raises OwnedError once
        another job owns the run."""
        now = time.monotonic()
        self._zero = now if since is None else since
        self._path = path
        self._heartbeats = heartbeats
        self._may_write = may_write
        self._written = now
        self._start: dict[str, Any] | None = None
        self._agent: dict[str, Any] = {
            "began": time.time() - (now - self._zero),
            "seconds": 0.0,
            "host": socket.gethostname(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "starts": [],
        }
        self._document = self._read()
        self._document["agents"].append(self._agent)

    def begin(self) -> None:
        """Begin the entry of a new start of the ranks. Call it after the heartbeats are cleared."""
        now = self._now()
        self._start = {"from_s": now, "to_s": now, "ended": None}
        self._agent["starts"].append(self._start)
        self._write()

    def watch(self) -> None:
        """Update the ledger if `EVERY_S` seconds have passed since the last write. Call it often."""
        if time.monotonic() - self._written >= EVERY_S:
            self._book(self._now())
            self._write()

    def freeze(self, hung: bool = False) -> None:
        """Close the account of this start: later time is not the ranks'. Only the first call counts.

        For ranks that hung, the account ends with rank 0's last heartbeat.
        """
        if self._start is not None:
            self._book(self._now() - (self._heartbeats.read(0).age_s if hung else 0.0))
            self._start = None

    def end(self, how: str) -> None:
        """Record how the last start of the ranks ended: `done`, `saved`, a signal's name, `hang`, `exit code 1`, ..."""
        self.freeze()
        if self._agent["starts"]:
            self._agent["starts"][-1]["ended"] = how
        self._write()

    def close(self) -> None:
        """Write the ledger for the last time."""
        self.freeze()
        self._write()

    def _now(self) -> float:
        return time.monotonic() - self._zero

    def _book(self, until: float) -> None:
        """Update the current start with rank 0's account until `until`."""
        if self._start is not None:
            account = self._heartbeats.account(0, self._zero + until)
            self._start |= {"to_s": round(until, 4), **_account_entry(account)}

    def _read(self) -> dict[str, Any]:
        try:
            document = read_ledger(self._path)
            summarise(document)
            return document
        except FileNotFoundError:
            pass
        except (OSError, *DAMAGE):
            aside = self._path.with_name(f"{self._path.name}.damaged")
            with contextlib.suppress(OSError):  # a damaged ledger cannot be continued
                os.replace(self._path, aside)
                say(f"{self._path} is damaged and was renamed to {aside.name}; starting a new one")
        return {"format": 1, "agents": []}

    def _write(self) -> None:
        self._written = time.monotonic()
        self._agent["seconds"] = round(self._now(), 4)
        try:
            self._may_write()
            with replacing(self._path) as file:  # not durable=True, as flushing the folder would delay the agent's loop
                file.write(json.dumps(self._document).encode())
                file.flush()
                os.fsync(file.fileno())
        except (OSError, OwnedError):
            return


def _account_entry(account: Account) -> dict[str, Any]:
    def nonzero(seconds: dict[str, float]) -> dict[str, float]:
        return {name: round(value, 4) for name, value in seconds.items() if round(value, 4)}

    steps = {"first": account.first, "done": account.done, "finished": account.finished}
    return {**steps, "seconds": nonzero(account.seconds), "unfinished": nonzero(account.unfinished)}


def process_age() -> float:
    """Return the seconds since this process started; 0 if the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError, IndexError):
        return 0.0


def read_ledger(path: Path) -> dict[str, Any]:
    """Read a ledger. Raises OSError if it cannot be read, ValueError if it is damaged."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        document = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(document, dict) or document.get("format") != 1 or not isinstance(document.get("agents"), list):
        raise ValueError(f"{path} is not a ledger of format 1")
    return document


# ---------------------------------------------------------------------------------------------------- summaries


@dataclass(frozen=True)
class Span:
    """A part of a run's life, from `start_s` to `stop_s` seconds after its beginning, and how it was spent.

    `steps` are the first and the last step of a start of the ranks (None between starts, and for a command that was
    refused or had nothing to do). `ended` is how it ended (None if it goes on, or its agent was killed), and `failed`
    whether that was a failure.
    """

    start_s: float
    stop_s: float
    seconds: dict[str, float]
    steps: tuple[int, int] | None = None
    ended: str | None = None
    failed: bool = False


@dataclass(frozen=True)
class Summary:
    """A run's whole life. `began` is a Unix time; `wall_s` lasts from then to the end of the ledger's last entry."""

    began: float
    wall_s: float
    spans: list[Span]
    lost_steps: int

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of the run's life by category."""
        return {name: sum(span.seconds.get(name, 0.0) for span in self.spans) for name in CATEGORIES}

    @property
    def goodput(self) -> float:
        """Return the share of `busy_s` that was effective training."""
        seconds = self.seconds
        return sum(seconds[name] for name in EFFECTIVE) / self.busy_s if self.busy_s else 0.0

    @property
    def busy_s(self) -> float:
        """Return the seconds of the run's life without its idle time."""
        return self.wall_s - self.seconds["idle"]

    @property
    def trained(self) -> bool:
        """Return whether the ledger covers any step."""
        return any(span.steps is not None and 0 < span.steps[0] <= span.steps[1] for span in self.spans)

    @property
    def num_starts(self) -> int:
        """Return how often the ranks were started."""
        return sum(span.steps is not None for span in self.spans)

    @property
    def failures(self) -> int:
        """Return how many starts ended with a failure."""
        return sum(span.failed for span in self.spans)

    @property
    def mtbf_s(self) -> float | None:
        """Return the mean time between failures: the ranks' running time per failure, None without a failure."""
        ran = sum(span.stop_s - span.start_s for span in self.spans if span.steps is not None)
        return ran / self.failures if self.failures else None


def summarise(document: dict[str, Any]) -> Summary:
    """Summarise a ledger.

    Steps that were repeated, by a later start or after a rollback, are lost work: each costs an equal share of the time
    that its start spent on finished steps. So is the unfinished step of a start that was cut off.

    A command that was refused, or had nothing left to do, changes nothing: its time is that of the pause around it.
    Raises one of `DAMAGE` for a damaged ledger.
    """
    agents = document["agents"]
    starts = [start for agent in agents for start in agent["starts"]]
    spans: list[Span] = []
    lost_steps = 0
    now = 0.0
    pause, job = "idle", None  # how the time between agents counts, and the Slurm job of the agent before
    for agent in agents:
        begins = max(now, agent["began"] - agents[0]["began"])  # clocks may differ between machines, or be set
        if begins > now:
            requeued = job is not None and agent.get("slurm_job") == job
            spans.append(Span(now, begins, {"downtime" if requeued else pause: begins - now}))
        now, gap = begins, "start-up"
        if _did_nothing(agent):
            now += agent["seconds"]
            spans.append(Span(begins, now, {pause: now - begins}, ended=agent["starts"][0]["ended"]))
            continue
        job = agent.get("slurm_job")
        for start in agent["starts"]:
            if begins + start["from_s"] > now:
                spans.append(Span(now, begins + start["from_s"], {gap: begins + start["from_s"] - now}))
            index = next(index for index, other in enumerate(starts) if other is start)
            later = starts[index + 1 :]
            cut_off = start["ended"] not in _GOOD_ENDS and (start["ended"] is not None or bool(later))
            kept = _kept(start, later)
            lost_steps += start.get("finished", 0) - kept
            now = begins + start["to_s"]
            first, last = start.get("first", 0), start.get("done", 0)
            seconds = _booked(start, kept, cut_off)
            failed = cut_off and start["ended"] not in _NO_FAILURES
            spans.append(Span(begins + start["from_s"], now, seconds, (first, last), start["ended"], failed))
            gap = "downtime"
        ended_well = bool(agent["starts"]) and agent["starts"][-1]["ended"] in _NO_FAILURES
        ends = begins + agent["seconds"]
        if ends > now:
            gap = "start-up" if not agent["starts"] else "end" if ended_well else "downtime"
            spans.append(Span(now, ends, {gap: ends - now}))
            now = ends
        pause = "idle" if ended_well else "downtime"
    return Summary(agents[0]["began"] if agents else 0.0, now, spans, lost_steps)


def _did_nothing(agent: dict[str, Any]) -> bool:
    """Return whether an agent's command was refused, or found the run done, before it began a step."""
    starts = agent["starts"]
    return len(starts) == 1 and starts[0]["ended"] in (*_REFUSED, "done") and not starts[0].get("first")


def _kept(start: dict[str, Any], later: list[dict[str, Any]]) -> int:
    """Return how many of the steps that a start finished were not repeated later."""
    begins = [other["first"] - 1 for other in later if other.get("first")]
    last = min([start.get("done", 0), *begins])
    return max(0, min(start.get("finished", 0), last - (start.get("first", 0) - 1))) if start.get("first") else 0


def _booked(start: dict[str, Any], kept: int, cut_off: bool) -> dict[str, float]:
    """Return a start's seconds by category."""
    seconds = _by_category(start.get("seconds", {}))
    unfinished = _by_category(start.get("unfinished", {}))
    finished = start.get("finished", 0)
    for name in _REPEATED:
        unfinished_s = unfinished[name]
        lost = (seconds[name] - unfinished_s) * (1 - kept / finished) if finished else 0.0
        lost += unfinished_s if cut_off else 0.0
        seconds[name] -= lost
        seconds["lost work"] += lost
    return seconds


def _by_category(phases: dict[str, float]) -> dict[str, float]:
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for phase, spent in phases.items():
        if phase != WAITED:
            seconds[_PHASES[phase]] += spent
    waited = min(phases.get(WAITED, 0.0), seconds["compute"])
    seconds["compute"] -= waited
    seconds["communication"] += waited
    return seconds

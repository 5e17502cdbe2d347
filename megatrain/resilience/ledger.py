"""The goodput ledger: what every second of a run's life went to, across restarts and requeues. Imports no torch.

The agent keeps it in `runs/<name>/ledger.json` (`Ledger`): one entry an agent, in it one a start of the ranks, with rank 0's
account of its time (`heartbeat.py`), brought up to date every `EVERY_S` seconds. What it adds up to, and which work
was in vain, is reckoned when it is read (`summarise`), for only later starts tell which steps were done again.
Inside an agent's life all times are of the monotonic clock; the wall clock tells only how far two agents are apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.errors import OwnedError
from megatrain.resilience.heartbeat import WAITED, Account, Heartbeats

FILE = "ledger.json"

EVERY_S = 10.0
"""Seconds between two writings: what a power cut may cost the ledger."""

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
)
"""What time goes to. `save` is what saves held the loop up; `lost work` are steps that were done again or never finished;
`downtime` is from a failure to the next start of the ranks, and from one agent to the next."""

EFFECTIVE = ("data", "compute", "communication")
"""Of these is effective training time, for steps that counted."""

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
"""What is done again together with a step."""

_GOOD_ENDS = ("done", "saved")


DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What reading and adding up a damaged ledger raises."""


class Ledger:
    """Books one agent's life. A disk that refuses is asked again at the next writing; it never stops the agent."""

    def __init__(
        self, path: Path, heartbeats: Heartbeats, may_write: Callable[[], None], since: float | None = None
    ) -> None:
        """`since` is when this agent's life began (time.monotonic(); default now); `may_write` raises OwnedError once
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
        """The ranks are started now; the heartbeats have just been cleared."""
        now = self._now()
        self._start = {"from_s": now, "to_s": now, "ended": None}
        self._agent["starts"].append(self._start)
        self._write()

    def watch(self) -> None:
        """Called often; writes once in a while."""
        if time.monotonic() - self._written >= EVERY_S:
            self._book(self._now())
            self._write()

    def freeze(self, hung: bool = False) -> None:
        """The ranks work no more, from now on; where they hung, since rank 0's last sign of life. What follows is downtime.
        Only the first call counts."""
        if self._start is not None:
            self._book(self._now() - (self._heartbeats.read(0).age_s if hung else 0.0))
            self._start = None

    def end(self, how: str) -> None:
        """How the last start of the ranks ended: `done`, `saved`, a signal's name, `hang`, `exit code 1`, ..."""
        self.freeze()
        if self._agent["starts"]:
            self._agent["starts"][-1]["ended"] = how
        self._write()

    def close(self) -> None:
        """The agent ends."""
        self.freeze()
        self._write()

    def _now(self) -> float:
        return time.monotonic() - self._zero

    def _book(self, until: float) -> None:
        """Write down what the ranks did since they were started."""
        if self._start is not None:
            account = self._heartbeats.account(0, self._zero + until)
            self._start |= {"to_s": round(until, 4), **_in_short(account)}

    def _read(self) -> dict[str, Any]:
        try:
            document = read_ledger(self._path)
            summarise(document)
            return document
        except FileNotFoundError:
            pass
        except (OSError, *DAMAGE):
            aside = self._path.with_name(f"{self._path.name}.damaged")
            with contextlib.suppress(OSError):  # nobody can add to it any more
                os.replace(self._path, aside)
                print(
                    f"megatrain: {self._path} is damaged and now {aside.name}; a new one begins",
                    file=sys.stderr,
                    flush=True,
                )
        return {"format": 1, "agents": []}

    def _write(self) -> None:
        self._written = time.monotonic()
        self._agent["seconds"] = round(self._now(), 4)
        try:
            self._may_write()
            temporary = self._path.with_suffix(".tmp")
            with temporary.open("w") as file:
                json.dump(self._document, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except (OSError, OwnedError):
            return


def _in_short(account: Account) -> dict[str, Any]:
    def shown(seconds: dict[str, float]) -> dict[str, float]:
        return {name: round(value, 4) for name, value in seconds.items() if round(value, 4)}

    steps = {"first": account.first, "done": account.done, "finished": account.finished}
    return {**steps, "seconds": shown(account.seconds), "unfinished": shown(account.unfinished)}


def process_age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError, IndexError):
        return 0.0


def read_ledger(path: Path) -> dict[str, Any]:
    """A ledger as it was written. Raises OSError where it cannot be read, ValueError where it is damaged."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file")
    try:
        document = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(document, dict) or document.get("format") != 1 or not isinstance(document.get("agents"), list):
        raise ValueError(f"{path} is not a ledger of format 1")
    return document


# ---------------------------------------------------------------------------------------------------- adding up


@dataclass(frozen=True)
class Span:
    """A stretch of a run's life, from `start_s` to `stop_s` since its beginning, and what it went to.

    `steps` are the first and the last step of a start of the ranks (None for what lies between starts), `ended` how the start
    ended (None where it goes on, or nobody was left to say), `failed` whether that was a failure.
    """

    start_s: float
    stop_s: float
    seconds: dict[str, float]
    steps: tuple[int, int] | None = None
    ended: str | None = None
    failed: bool = False


@dataclass(frozen=True)
class Summary:
    """A run's whole life. `wall_s` is from its first agent's beginning to the last thing the ledger knows."""

    began: float
    wall_s: float
    spans: list[Span]
    lost_steps: int

    @property
    def seconds(self) -> dict[str, float]:
        """By category, of the whole life."""
        return {name: sum(span.seconds.get(name, 0.0) for span in self.spans) for name in CATEGORIES}

    @property
    def goodput(self) -> float:
        """Share of the life that was effective training."""
        seconds = self.seconds
        return sum(seconds[name] for name in EFFECTIVE) / self.wall_s if self.wall_s else 0.0

    @property
    def num_starts(self) -> int:
        """How often the ranks were started."""
        return sum(span.steps is not None for span in self.spans)

    @property
    def failures(self) -> int:
        """How many starts ended with a failure."""
        return sum(span.failed for span in self.spans)

    @property
    def mtbf_s(self) -> float | None:
        """Mean time between failures: how long ranks ran, over how often they failed; None where they never did."""
        ran = sum(span.stop_s - span.start_s for span in self.spans if span.steps is not None)
        return ran / self.failures if self.failures else None


def summarise(document: dict[str, Any]) -> Summary:
    """What a ledger adds up to.

    Of a start's time for steps, the share of those is lost that are not there at the end: a later start began before them,
    or a rollback did them again. What a failed start had spent on a step that it did not finish is lost, too.
    """
    agents = document["agents"]
    starts = [start for agent in agents for start in agent["starts"]]
    spans: list[Span] = []
    lost_steps = 0
    now = 0.0
    for agent in agents:
        begins = max(now, agent["began"] - agents[0]["began"])  # clocks of two machines may differ, or be set
        if begins > now:
            spans.append(Span(now, begins, {"downtime": begins - now}))
        now, gap = begins, "start-up"
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
            failed = cut_off and start["ended"] != "interrupted"
            spans.append(Span(begins + start["from_s"], now, seconds, (first, last), start["ended"], failed))
            gap = "downtime"
        ends = begins + agent["seconds"]
        if ends > now:
            last_end = agent["starts"][-1]["ended"] if agent["starts"] else None
            gap = "start-up" if not agent["starts"] else "end" if last_end in _GOOD_ENDS else "downtime"
            spans.append(Span(now, ends, {gap: ends - now}))
            now = ends
    return Summary(agents[0]["began"] if agents else 0.0, now, spans, lost_steps)


def _kept(start: dict[str, Any], later: list[dict[str, Any]]) -> int:
    """How many of the steps that a start finished are there at the end."""
    begins = [other["first"] - 1 for other in later if other.get("first")]
    last = min([start.get("done", 0), *begins])
    return max(0, min(start.get("finished", 0), last - (start.get("first", 0) - 1))) if start.get("first") else 0


def _booked(start: dict[str, Any], kept: int, cut_off: bool) -> dict[str, float]:
    """A start's seconds by category."""
    seconds = _by_category(start.get("seconds", {}))
    unfinished = _by_category(start.get("unfinished", {}))
    finished = start.get("finished", 0)
    for name in _REPEATED:
        open_now = unfinished[name]
        in_vain = (seconds[name] - open_now) * (1 - kept / finished) if finished else 0.0
        in_vain += open_now if cut_off else 0.0
        seconds[name] -= in_vain
        seconds["lost work"] += in_vain
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

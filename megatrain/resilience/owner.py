"""One writer a run folder. Imports no torch.

Owners are numbered: `runs/<name>/owner/00000001.json` and so on, and the highest number owns the folder. A job becomes the
owner by creating the next number, which only one can; having a number above one's own means that one may write no more
(a fencing token: Kleppmann, "How to do distributed locking", 2016). Nothing is locked, so nothing depends on what a network
file system makes of locks, and no clock is compared with another machine's.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatrain.errors import OwnedError, cannot_write

FOLDER = "owner"

ENVIRONMENT = "MEGATRAIN_OWNER"
"""The number that the agent holds, in its workers' environment."""

BEAT_S = 5.0
"""Seconds between an owner's signs of life."""

WATCH_S = 20.0
"""Seconds without a sign of life after which an owner on another machine counts as gone."""

_NAME = re.compile(r"(\d{8,})\.json")


class Ownership:
    """The right to write to a run's folder, as its `number`-th owner."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        self.number = number
        self._file = _path(folder, number)
        self._next = _path(folder, number + 1)
        self._beaten = time.monotonic()
        self._mine = _who(_read(self._file))

    @classmethod
    def take(cls, run_dir: Path, watch_s: float = WATCH_S) -> Ownership:
        """Become the owner of `run_dir`.

        An owner of this machine is asked for by its process, one of an earlier start of the same Slurm job is gone, and
        any other is watched for `watch_s` seconds.

        Raises:
            OwnedError: another job owns the folder.
            ConfigError, EnvironmentFault: the folder cannot be written.
        """
        folder = run_dir / FOLDER
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                last = last_owner(folder)
                if last and not (last[1].get("released") or _is_gone(_path(folder, last[0]), last[1], watch_s)):
                    raise OwnedError(
                        f"{run_dir} belongs to another job: {describe(last[1])}. Wait for it, end it, or use another "
                        f"run.name"
                    )
                number = last[0] + 1 if last else 1
                try:
                    _create(_path(folder, number), identity())
                except FileExistsError:
                    continue  # another job was faster; it is the owner now
                for older in folder.iterdir():
                    if (match := _NAME.fullmatch(older.name)) and int(match[1]) < number - 1:
                        older.unlink(missing_ok=True)
                return cls(folder, number)
        except OSError as error:
            raise cannot_write(run_dir, error) from error

    @classmethod
    def from_environ(cls, run_dir: Path, environ: Mapping[str, str] | None = None) -> Ownership | None:
        """What the agent holds for this process, if there is an agent."""
        number = (os.environ if environ is None else environ).get(ENVIRONMENT)
        return cls(run_dir / FOLDER, int(number)) if number else None

    def check(self) -> None:
        """Called before anything is written; a sign of life, too.

        Raises:
            OwnedError: another job has taken the folder over meanwhile.
        """
        if self._next.exists() or not self._file.exists() or self._is_anothers():
            if not self.folder.parent.exists():
                raise OwnedError(f"{self.folder.parent} is gone, moved or removed; this job writes no more")
            last = last_owner(self.folder) if self.folder.exists() else None
            told = describe(last[1]) if last else "someone who removed this job's mark"
            raise OwnedError(f"{self.folder.parent} was taken over by {told}; this job writes no more")
        self.beat()

    def _is_anothers(self) -> bool:
        """Whether somebody removed the marks and another job has this number now; looked at as often as a sign of life is
        given."""
        if self._mine is None or time.monotonic() - self._beaten < BEAT_S:
            return False
        return _who(_read(self._file)) not in (None, self._mine)

    def beat(self) -> None:
        """Give a sign of life, if it is time."""
        now = time.monotonic()
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            try:
                os.utime(self._file)
            except OSError:
                return  # the disk is away for the moment, or another took over; who writes next finds out

    def release(self) -> None:
        """Leave the folder to whoever comes next."""
        try:
            if not self._next.exists():
                temporary = self._file.with_suffix(".tmp")
                temporary.write_text(json.dumps({**_read(self._file), "released": _now()}))
                os.replace(temporary, self._file)
        except OSError:
            return  # it will be found stale


def last_owner(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest owner's number and what it says of itself ({} where that cannot be read); None where there is none."""
    numbers = [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return (max(numbers), _read(_path(folder, max(numbers)))) if numbers else None


def identity() -> dict[str, Any]:
    """What an owner says of itself."""
    return {
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "pid": os.getpid(),
        "since": _now(),
        "machine": _machine(),
        "process_started": _started(os.getpid()),
    }


def describe(owner: dict[str, Any]) -> str:
    """An owner in words: host, job, process and since when."""
    if not owner:
        return "an owner whose mark cannot be read"
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    return f"host {owner.get('host')}{job}, process {owner.get('pid')}, since {owner.get('since')}"


def _who(owner: dict[str, Any]) -> tuple[Any, ...] | None:
    """What tells an owner from all others; None where its mark cannot be read."""
    return tuple(owner.get(name) for name in ("host", "job", "pid", "since", "process_started")) if owner else None


def _is_gone(path: Path, owner: dict[str, Any], watch_s: float) -> bool:
    """Whether an owner no longer runs."""
    job = os.environ.get("SLURM_JOB_ID")
    requeued = job is not None and owner.get("job") == job
    if owner.get("machine") and owner["machine"] == _machine():

        def runs() -> bool:
            return _started(int(owner["pid"])) == owner.get("process_started")

        return not runs() or (requeued and _changes(runs, watch_s))  # this job's former start may still be ending
    if requeued:
        return True
    print(
        f"megatrain: the run folder's last owner ({describe(owner)}) did not say that it ended; watching it for "
        f"{watch_s:g} s",
        file=sys.stderr,
        flush=True,
    )
    return not _changes(lambda: _stamp(path), watch_s)


def _changes(look: Callable[[], Any], seconds: float) -> bool:
    """Whether what `look` returns changes within so many seconds."""
    first, deadline = look(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.2, seconds / 10))
        if look() != first:
            return True
    return False


def _stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of a file; opened, since a network file system answers a mere stat from its memory."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return status.st_size, status.st_mtime_ns
    except OSError:
        return None


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def _create(path: Path, document: dict[str, Any]) -> None:
    """Make a file that must not exist yet; whoever sees it sees all of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.{time.monotonic_ns()}")
    try:
        with temporary.open("x") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # fails where the name is taken
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _machine() -> str | None:
    """What tells machines, their starts and their process namespaces apart; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks; None where there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")

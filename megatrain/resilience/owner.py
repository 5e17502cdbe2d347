"""Ownership of a folder, such as a run's: one writer at a time. Imports no torch.

Owners are numbered: `runs/<name>/owner/00000001.json` and so on, and the highest number owns the folder. A job becomes
the owner by creating the next number, which only one job can do. A job that sees a number above its own must stop
writing (a fencing token: Kleppmann, "How to do distributed locking", 2016). This needs no locks, which some network
file systems ignore, and compares no clocks across machines.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatrain.errors import OwnedError, cannot_write
from megatrain.resilience.atomic_file import remove_abandoned, temporary_name, write_atomically
from megatrain.resilience.terminal import say

FOLDER = "owner"

ENVIRONMENT = "MEGATRAIN_OWNER"
"""Environment variable that tells workers the owner number of their agent."""

BEAT_S = 5.0
"""Seconds between heartbeats of an owner."""

WATCH_S = 20.0
"""Seconds without a heartbeat after which an owner on another machine counts as gone."""

_NAME = re.compile(r"(\d{8,})\.json")


class Ownership:
    """The right to write to a run's folder, as its `number`-th owner."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder
        self.number = number
        self._file = _path(folder, number)
        self._next = _path(folder, number + 1)
        self._beaten = time.monotonic()
        self._identity = _key(_read(self._file))

    @classmethod
    def take(
        cls, run_dir: Path, watch_s: float = WATCH_S, name_key: str = "run.name", dir_key: str = "run.dir"
    ) -> Ownership:
        """Become the owner of `run_dir`, which the config keys `name_key` and `dir_key` name.

        The previous owner must have released it or be gone. On this machine it is gone if its process has exited; on
        another, if it was an earlier start of the same Slurm job, or sends no heartbeat for `watch_s` seconds.

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
                        f"{name_key}"
                    )
                number = last[0] + 1 if last else 1
                try:
                    _create(_path(folder, number), identity())
                except FileExistsError:
                    continue  # another job was faster; look at it
                for older in folder.iterdir():
                    if (match := _NAME.fullmatch(older.name)) and int(match[1]) < number - 1:
                        older.unlink(missing_ok=True)
                remove_abandoned(folder)
                return cls(folder, number)
        except OSError as error:
            raise cannot_write(run_dir, error, dir_key) from error

    @classmethod
    def from_environ(cls, run_dir: Path, environ: Mapping[str, str] | None = None) -> Ownership | None:
        """Return the agent's ownership, or None if this process has no agent."""
        number = (os.environ if environ is None else environ).get(ENVIRONMENT)
        return cls(run_dir / FOLDER, int(number)) if number else None

    def check(self) -> None:
        """Check, before each write, that this job still owns the folder; send a heartbeat if one is due.

        Raises:
            OwnedError: another job has taken over the folder.
        """
        if self._next.exists() or not self._file.exists() or self._was_replaced():
            if not self.folder.parent.exists():
                raise OwnedError(f"{self.folder.parent} is gone, moved or removed; this job stops writing")
            last = last_owner(self.folder) if self.folder.exists() else None
            by = describe(last[1]) if last else "someone who removed this job's owner file"
            raise OwnedError(f"{self.folder.parent} was taken over by {by}; this job stops writing")
        self.beat()

    def _was_replaced(self) -> bool:
        """Return whether the owner files were removed and another job now has this number. Looks once per heartbeat."""
        if self._identity is None or time.monotonic() - self._beaten < BEAT_S:
            return False
        return _key(_read(self._file)) not in (None, self._identity)

    def beat(self) -> None:
        """Send a heartbeat if one is due."""
        now = time.monotonic()
        if now - self._beaten >= BEAT_S:
            self._beaten = now
            try:
                os.utime(self._file)
            except OSError:
                return  # the disk is unavailable for now, or another job took over; the next check finds out

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Send heartbeats from a thread while the block runs."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_S):
                self.beat()

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def release(self) -> None:
        """Release the folder for the next job."""
        try:
            if not self._next.exists():
                write_atomically(self._file, json.dumps({**_read(self._file), "released": _now()}))
        except OSError:
            return  # the next job will find this owner gone


def last_owner(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """Return the newest owner's number and identity ({} if its file cannot be read), or None if there is no owner."""
    numbers = [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return (max(numbers), _read(_path(folder, max(numbers)))) if numbers else None


def is_held(run_dir: Path) -> bool:
    """Return whether a job seems to own the run's folder now. Waits for nothing and writes nothing.

    On another machine, a heartbeat within three times `WATCH_S` counts, as clocks differ a little.
    """
    folder = run_dir / FOLDER
    try:
        last = last_owner(folder)
        if last is None or not last[1] or last[1].get("released"):
            return False
        if last[1].get("machine") and last[1]["machine"] == _machine():
            return _runs(last[1])
        return time.time() - _path(folder, last[0]).stat().st_mtime < 3 * WATCH_S
    except (OSError, KeyError, ValueError):
        return False


def identity() -> dict[str, Any]:
    """Return the identity of this process as an owner."""
    return {
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "pid": os.getpid(),
        "since": _now(),
        "machine": _machine(),
        "process_started": _started(os.getpid()),
    }


def describe(owner: dict[str, Any]) -> str:
    """Describe an owner: host, job, process and start time."""
    if not owner:
        return "an owner whose file cannot be read"
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    return f"host {owner.get('host')}{job}, process {owner.get('pid')}, since {owner.get('since')}"


def _key(owner: dict[str, Any]) -> tuple[Any, ...] | None:
    """Return what distinguishes an owner from all others, or None if its file cannot be read."""
    return tuple(owner.get(name) for name in ("host", "job", "pid", "since", "process_started")) if owner else None


def _is_gone(path: Path, owner: dict[str, Any], watch_s: float) -> bool:
    """Return whether an owner has exited, or seems to have."""
    job = os.environ.get("SLURM_JOB_ID")
    requeued = job is not None and owner.get("job") == job
    if owner.get("machine") and owner["machine"] == _machine():
        # the previous start of this job may still be exiting
        return not _runs(owner) or (requeued and _changes(lambda: _runs(owner), watch_s))
    if requeued:
        return True
    say(f"the folder's last owner ({describe(owner)}) did not release it; watching it for {watch_s:g} s")
    return not _changes(lambda: _size_and_time(path), watch_s)


def _runs(owner: dict[str, Any]) -> bool:
    """Return whether the process of an owner on this machine runs."""
    return _started(int(owner["pid"])) == owner.get("process_started")


def _changes(look: Callable[[], Any], seconds: float) -> bool:
    """Return whether the result of `look` changes within `seconds`."""
    first, deadline = look(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.2, seconds / 10))
        if look() != first:
            return True
    return False


def _size_and_time(path: Path) -> tuple[int, int] | None:
    """Return a file's size and modification time. Opens it, as a network file system may answer stat from its cache."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            return status.st_size, status.st_mtime_ns
    except OSError:
        return None


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.json"


def _create(path: Path, document: dict[str, Any]) -> None:
    """Create a file with all its content or not at all. Raises FileExistsError if the name is taken."""
    temporary = temporary_name(path)
    try:
        with temporary.open("x") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # fails if the name is taken
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _machine() -> str | None:
    """Return an id of this machine, its boot and the PID namespace, or None if the system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process of this machine was started, in kernel ticks, or None if it has ended or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")

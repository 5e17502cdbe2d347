"""Tiny Python programs that stand in for training workers in the tests of agents."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

from megatrain.resilience import heartbeat

END = f"""
def end(code):
    import mmap, os, sys
    records = os.environ.get("{heartbeat.ENVIRONMENT}")
    if records:
        mmap.mmap(int(records), 0)[int(os.environ["LOCAL_RANK"]) * {heartbeat._SIZE} + {heartbeat._END}] = code + 1
    sys.exit(code)

def asked_by():
    import mmap, os
    records = mmap.mmap(int(os.environ["{heartbeat.ENVIRONMENT}"]), 0)
    return records[int(os.environ["LOCAL_RANK"]) * {heartbeat._SIZE} + {heartbeat._ASKED}]
"""
"""Functions for workers: end well with 0 or 75, as a rank does that is done or has saved; the signal that the agent
got."""

PYTHON = [sys.executable, "-E", "-S"]
SAVE_ON_TERM = """
    import os, pathlib, signal, sys, time
    here = pathlib.Path(sys.argv[1])
    rank = os.environ["RANK"]
    def save(number, frame):
        (here / f"got_{rank}").write_text(signal.Signals(number).name)
        (here / f"sent_{rank}").write_text(str(asked_by()))
        time.sleep(float(sys.argv[2]))
        (here / f"saved_{rank}").touch()
        end(75)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, save)
    (here / f"pid_{rank}").write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)
"""


def worker(code: str, *arguments: object) -> list[str]:
    """Return the command of a worker that runs `code`, which may call `end`."""
    return [*PYTHON, "-c", END + textwrap.dedent(code), *map(str, arguments)]


def exit_with(*codes: str) -> list[str]:
    """Return a worker whose rank r exits with `codes[r]`, an expression that the worker evaluates."""
    return worker(
        """
        import os, signal, sys, time
        def die(name): os.kill(os.getpid(), getattr(signal, name))
        def sleep(seconds): time.sleep(seconds)
        code = eval(sys.argv[1 + int(os.environ["RANK"])])
        end(code) if code in (0, 75) else sys.exit(code)
        """,
        *codes,
    )


def wait_for(*paths: Path, seconds: float = 20.0) -> None:
    """Wait until the files exist."""
    deadline = time.monotonic() + seconds
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < deadline, f"none of {[str(path) for path in paths]} came"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether a process is alive (a zombie is not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

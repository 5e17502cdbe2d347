"""prepare's worker processes do not outlive it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import os, time
from megatrain.data.corpus.worker_pool import Workers

def pid(_):
    time.sleep(0.3)  # long enough that both workers get one
    return os.getpid()

if __name__ == "__main__":
    with Workers(2) as workers:
        print(*set(workers.map(pid, range(4))), flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_parent_that_is_killed(tmp_path, number):
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen([sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, text=True)
    pids = [int(text) for text in process.stdout.readline().split()]
    assert len(pids) == 2
    process.send_signal(number)
    process.wait()
    deadline = time.monotonic() + 10
    while running := [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and not is_zombie(pid)]:
        assert time.monotonic() < deadline, f"{running} outlived their parent"
        time.sleep(0.05)


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True

"""Ranks that cannot connect, or must not: started as by torchrun, each exits with code 8 and the reason, in time."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time

import pytest
from support.commands import TRAIN

HERE = socket.gethostname()
LIMIT = 8
"""launch.timeout_s; importing torch comes before it, ending after it."""


def start_rank(folder, rank, port, address="127.0.0.1", name="rendezvous", environ=None, words=()):
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    place |= {"MASTER_ADDR": address, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", **(environ or {})}
    return subprocess.Popen(
        [sys.executable, "-m", "megatrain", *TRAIN, f"run.name={name}", f"launch.timeout_s={LIMIT}", *words],
        cwd=folder,
        env={**os.environ, **{key: str(value) for key, value in place.items()}},
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """Return exit code and messages; kill a rank that hangs."""
    try:
        return process.communicate(timeout=240)[1], process.returncode
    finally:
        process.kill()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def listener():
    """Listen on a port that belongs to another program, and answer no connection."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize(
    ("rank", "what"),
    [(0, "taken"), (1, "somebody else's"), (0, "nobody comes"), (1, "nobody answers"), (1, "no route"), (1, "no name")],
)
def test_ranks_that_cannot_connect_report_it_in_time(workplace, rank, what):
    address = {"no route": "192.0.2.1", "no name": "nowhere.invalid"}.get(what, "127.0.0.1")
    with listener() if what in ("taken", "somebody else's") else contextlib.nullcontext(free_port()) as port:
        started = time.monotonic()
        error, code = end(start_rank(workplace, rank, port, address))
    assert code == 8, error
    expected = f"rank {rank} could not join the other rank at {address}:{port} within {LIMIT} s (launch.timeout_s): "
    assert expected in error and "Traceback" not in error, error
    assert what != "taken" or "address already in use" in error.lower(), error
    assert time.monotonic() - started < 200


def test_ranks_with_different_versions_name_them(workplace, tmp_path):
    """Rank 1 finds another DeepSpeed first on its path; both ranks end before training."""
    other = tmp_path / "deepspeed-0.1.2.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1.2\n")
    path = os.pathsep.join(part for part in (str(tmp_path), os.environ.get("PYTHONPATH")) if part)
    port = free_port()
    ranks = [
        start_rank(workplace, rank, port, environ={"PYTHONPATH": path} if rank else None, words=["launch.timeout_s=60"])
        for rank in (0, 1)
    ]
    for error, code in [end(rank) for rank in ranks]:
        assert code == 8, error
        assert f"preflight: {HERE}, rank 1: deepspeed 0.1.2, but " in error and " on rank 0" in error, error
    assert not (workplace / "runs" / "rendezvous" / "metrics.jsonl").exists()

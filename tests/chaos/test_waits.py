"""A peer that never comes: every process group waits for `launch.timeout_s` at most; one rank needs no network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from support.commands import TRAIN, megatrain, metrics, same
from support.jobs import batches, job, llama
from support.ranks import run_ranks

from megatrain.config import LaunchConfig
from megatrain.distributed.rank_environment import RankEnvironment
from megatrain.distributed.world import join
from megatrain.engine.build import build_engine
from megatrain.launch.rank_process import free_port
from megatrain.parallel.layout import Layout

LIMIT = 8.0
"""launch.timeout_s of these jobs, in seconds; torch's own default is 30 minutes."""

JOBS: dict[str, tuple[str, dict[str, int]]] = {
    "native, shards x tensor": ("native", {"zero": 3, "tp": 2}),
    "native, hybrid shards": ("native", {"zero": 2, "dp_replicate": 2}),
    "native, pipeline": ("native", {"zero": 1, "pp": 2}),
    "native, context (ulysses)": ("native", {"zero": 1, "cp": 2}),
    "native, context (ring) x pipeline": ("native", {"zero": 0, "cp": 2, "cp_kind": "ring", "pp": 2}),
    "DeepSpeed, shards x tensor": ("deepspeed", {"zero": 2, "tp": 2}),
    "DeepSpeed, shards x context": ("deepspeed", {"zero": 3, "cp": 2}),
}
"""Layouts of four ranks: an axis over all ranks of a job would share the default group."""


def wait_alone(world, port, kind, folder):
    """Train one step together; then rank 0 sums over each group alone. Return the group, seconds and error of each."""
    engine_name, sizes = JOBS[kind]
    dist.destroy_process_group()
    config = job(engine_name, 0, model=llama(ffn_size=40))
    for name, value in sizes.items():
        setattr(config.parallel, name, value)
    os.environ.update(RANK=str(world.rank), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    own = join(LaunchConfig(device="cpu", timeout_s=LIMIT), RankEnvironment.from_environ())
    engine, layout = build_engine(config, own), Layout.of(config, 4)
    float(engine.train_step(batches(config, 1, layout.dp_rank(own.rank), layout.dp), 1e-3, 1).grad_norm)
    dist.barrier = lambda *_, **__: None  # what the helper calls at the end: the groups are broken by then
    over = folder / "over"
    if own.rank > 0:
        while not over.exists():
            time.sleep(0.1)
        return []
    groups = [group for group in c10d._world.pg_map if group.size() > 1]
    started, found = time.monotonic(), []
    for group, work in [(g, dist.all_reduce(torch.ones(1), group=g, async_op=True)) for g in groups]:
        error = "none"
        try:
            work.wait()
        except RuntimeError as raised:
            error = str(raised)
        found.append((group.group_name, time.monotonic() - started, error))
    over.touch()
    return found


@pytest.mark.parametrize("kind", JOBS)
def test_a_group_waits_no_longer_than_the_limit(kind, tmp_path):
    found = run_ranks(wait_alone, 4, free_port(), kind, tmp_path)[0]
    assert len(found) >= 4, "the default and the control group, and one for each axis"
    for group in found:
        assert LIMIT - 1 < group[1] < 2 * LIMIT and "imed out" in group[2], found


def test_under_torchrun_a_stopped_rank_ends_the_others_wait(workplace):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatrain"]
    words = [*TRAIN, "engine=native", "run.name=waits", f"launch.timeout_s={LIMIT}", "train.steps=100000"]
    process = subprocess.Popen([*torchrun, *words], cwd=workplace, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(metrics(workplace, "waits")) < 3:
        assert time.monotonic() < deadline and process.poll() is None, "the job does not train"
        time.sleep(0.1)
    os.kill(rank_process(1, "run.name=waits"), signal.SIGSTOP)
    try:
        _, error = process.communicate(timeout=LIMIT + 90)  # torchrun gives the stopped rank 30 s to end
    finally:
        process.kill()
    assert process.returncode == 1, "torchrun's code for any failure"
    assert "megatrain: error: " in error and "exitcode  : 8" in error, error


def rank_process(rank, word):
    """Return the process id of a rank of the job whose command has `word`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environ = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile, or belongs to another user
            continue
        if f"RANK={rank}".encode() in environ and word.encode() in command:
            return int(entry.name)
    raise AssertionError(f"no process is rank {rank}")


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_one_rank_needs_no_network(workplace, engine):
    """In a network namespace whose only interface, loopback, is down; the numbers are those of any other place."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("a network namespace needs root")
    words = [*TRAIN, f"engine={engine}", "train.steps=4", "train.eval_every=0"]
    without = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "megatrain", *words, f"run.name=alone-{engine}"],
        cwd=workplace, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert without.returncode == 0, without.stderr
    assert megatrain(workplace, *words, f"run.name=usual-{engine}").returncode == 0
    same(metrics(workplace, f"alone-{engine}"), metrics(workplace, f"usual-{engine}"))

"""The same command under torchrun, and a data fault that only one of two ranks meets."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from support.commands import TRAIN, megatrain, metrics

from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.order import SampleOrder

SHORT = [*TRAIN, "train.steps=4", "train.eval_steps=1", "engine=deepspeed", "parallel.zero=2"]
VALUES = ("step", "loss", "grad_norm", "lr", "tokens", "batch_hash", "heldout_loss")


def values(folder, name):
    return [{key: record.get(key) for key in VALUES} for record in metrics(folder, name)]


def processes_with(word: str) -> list[str]:
    """Return the command lines of running processes that contain a word."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        if word in line:
            lines.append(line)
    return lines


def test_torchrun_trains_as_our_own_agent_does(workplace):
    """With two ranks each, every recorded number is equal, and only rank 0 writes the run folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "megatrain"]
    theirs = subprocess.run(
        [*torchrun, *SHORT, "run.name=torchrun", "launch.nproc_per_node=4", "train.micro_batch_size=1"],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert theirs.returncode == 0, theirs.stderr
    assert theirs.stderr.count("launch.nproc_per_node=4") == 1
    ours = megatrain(workplace, *SHORT, "run.name=agent", "launch.nproc_per_node=2", "train.micro_batch_size=1")
    assert ours.returncode == 0, ours.stderr
    assert [record["step"] for record in values(workplace, "torchrun")] == [1, 2, 3, 4]
    assert values(workplace, "torchrun") == values(workplace, "agent")
    logs = workplace / "runs" / "torchrun" / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["rank_00000.log", "rank_00001.log"]


def test_a_data_fault_on_one_rank_ends_all_ranks_with_one_message(workplace):
    """Rank 1 meets an id outside the vocabulary in step 3: exit code 3, the file and the byte, no process left."""
    folder = workplace / "faulty" / "tiny"
    shutil.copytree(workplace / "data" / "tiny", folder)
    dataset = IndexedDataset.open(folder, "train", verify=False)
    order = SampleOrder(dataset.fingerprint, "train", 32, (dataset.num_tokens - 1) // 32, 1234)
    sample = 2 * 8 + 2  # in step 3; ranks take two samples each in turn, so this one is rank 1's
    token = int(order.windows(np.array([sample]))[0]) * 32 + 7
    with (folder / "train.bin").open("r+b") as file:
        file.seek(2 * token)  # uint16
        file.write(b"\xff\xff")
    started = time.monotonic()
    done = megatrain(
        workplace, *SHORT, "run.name=faulty", "data.dir=faulty", "data.verify=false", "launch.nproc_per_node=2"
    )
    assert done.returncode == 3, done.stderr
    message = f"faulty/tiny/train.bin: token id 65535 at {dataset.place(token)} is outside"
    assert done.stderr.count(message) == 1 and "Traceback" not in done.stderr, done.stderr
    assert [record["step"] for record in metrics(workplace, "faulty")] == [1, 2]
    assert time.monotonic() - started < 120 and processes_with("run.name=faulty") == []

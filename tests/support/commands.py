"""The command as a user types it, for the end-to-end tests: a small training job, started, waited for and read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys

TRAIN = [
    "train", "model=tiny", "data=files", "data.name=tiny", "train.seq_len=32", "train.global_batch_size=8",
    "train.micro_batch_size=2", "train.steps=40", "checkpoint.every=5", "train.eval_every=20",
    "train.eval_steps=4", "optim.lr=1e-3",
    "tracking=none", "model.num_layers=2", "model.hidden_size=32",
]  # fmt: skip
TWO_NATIVE = [*TRAIN, "engine=native", "launch.nproc_per_node=2"]
"""For tests in which the engine does not matter: the native one starts in half the time."""


def megatrain(folder, *words, environ=None, timeout=240):
    return subprocess.run(
        [sys.executable, "-m", "megatrain", *words],
        cwd=folder,
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start(folder, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "megatrain", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def metrics(folder, name, runs="runs"):
    path = folder / runs / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(folder, name, kind=None):
    lines = (folder / "runs" / name / "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [event for event in found if kind is None or event["kind"] == kind]


def same(records, expected, keys=("step", "loss", "grad_norm", "lr", "tokens", "batch_hash", "updated")):
    assert [{key: record[key] for key in keys} for record in records] == [
        {key: r[key] for key in keys} for r in expected
    ]


def final_files(folder, name):
    """Return checksums of the last checkpoint's files.

    For one layout and engine they are equal exactly if all tensors are bit-equal.
    """
    last = max((folder / "runs" / name / "checkpoints").glob("step_*"))
    manifest = json.loads((last / "manifest.json").read_text())
    return manifest["step"], {file: recorded["xxh3"] for file, recorded in manifest["files"].items()}

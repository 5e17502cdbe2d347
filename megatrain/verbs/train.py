"""`megatrain train` as a person starts it: submit a Slurm job, or be this node's agent. Imports no torch.

What a rank does is `train/rank.py`'s.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatrain.config import TrainConfig
from megatrain.launch import agent, slurm
from megatrain.launch.nodes import Peers, SingleNode
from megatrain.launch.recovery import Recovery
from megatrain.resilience.ledger import process_age
from megatrain.resilience.owner import FOLDER, Ownership
from megatrain.resilience.watchdog import Limits
from megatrain.verbs import path_checks


def start(config: TrainConfig, flags: Sequence[str], overrides: Sequence[str]) -> int:
    """Submit a training job (`launch=slurm`), or run this node's agent; return the exit code.

    `flags` and `overrides` are the words of the command line, which every rank is started with too.
    """
    assert config.run.name is not None, "compose gives every run a name"
    step = slurm.Step.from_environ()
    if step is None and config.launch.name == "slurm":
        path_checks.check_paths(config)
        words = [*(flag for flag in flags if flag != "--dry-run"), *overrides]
        return slurm.submit(config.launch, config.run.name, words, dry_run="--dry-run" in flags)
    slurm.check_plain_start(config.launch, step)
    peers = step.meet(config.launch.timeout_s) if step else SingleNode()
    try:
        slurm.together(peers, lambda: path_checks.check_paths(config))
        return start_workers(config, [*flags, *overrides], peers)
    finally:
        peers.close()


def start_workers(config: TrainConfig, words: Sequence[str], peers: Peers) -> int:
    """Run `megatrain train` with `words` as `launch.nproc_per_node` ranks on this node; return the job's exit code.

    Node 0's agent owns the run's folder, for all.
    """
    command = [sys.executable, "-m", "megatrain", "train", *words]
    run_dir = Path(config.run.dir) / str(config.run.name)
    on_gpu = has_gpu(config.launch.device)
    limits = Limits(config.resilience.hang_timeout(on_gpu), config.launch.timeout_s)
    taken = slurm.together(peers, lambda: Ownership.take(run_dir) if peers.node == 0 else None)
    try:
        number = peers.all_gather(taken.number if taken else None)[0]
        owner = taken or Ownership(run_dir / FOLDER, number)
        copies = config.checkpoint.copies_every(on_gpu) > 0
        since = time.monotonic() - process_age()
        modules = worker_modules(config)
        recovery = Recovery(run_dir, owner, config.resilience.max_restarts, limits, copies, modules, since)
        return agent.launch(command, config.launch.nproc_per_node, run_dir / "logs", recovery, peers)
    finally:
        if taken is not None:
            taken.release()


def worker_modules(config: TrainConfig) -> list[str]:
    """What a worker imports on its way to the first step, but for what may touch a GPU: forks cannot share that."""
    modules = [
        "megatrain.cli",
        "megatrain.config.compose",
        "megatrain.verbs.path_checks",
        "megatrain.verbs.value_checks",
        "megatrain.train.rank",
        "megatrain.engine.native",
    ]
    if config.engine.name == "deepspeed" and not has_gpu(config.launch.device):
        modules[-1] = "megatrain.engine.deepspeed"
        modules.append("deepspeed")
    return modules


def has_gpu(device: str) -> bool:
    """Whether workers will run on NVIDIA GPUs, found without torch."""
    return device == "cuda" or (device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))

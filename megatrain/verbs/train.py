"""`megatrain train`: submit a Slurm job, or run this node's agent. Imports no torch.

A rank runs `training/rank.py` instead.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatrain.checkpoint.naming import list_checkpoints
from megatrain.config import PrepareConfig, TrainConfig
from megatrain.config.compose import read_overrides
from megatrain.config.values import quoted
from megatrain.distributed.python_process import python_command
from megatrain.errors import EXIT_BAD_CHECKPOINT, EXIT_BAD_CONFIG, EXIT_BAD_DATA, EXIT_ENVIRONMENT, EXIT_OK
from megatrain.launch import agent, slurm
from megatrain.launch.nodes import Peers, SingleNode
from megatrain.launch.rank_process import log_name
from megatrain.launch.recovery import EVENTS, Recovery
from megatrain.resilience.ledger import process_age
from megatrain.resilience.owner import FOLDER, Ownership
from megatrain.resilience.terminal import keep_log, say, show
from megatrain.resilience.watchdog import Limits
from megatrain.training.history import has_begun, nothing_to_do
from megatrain.verbs import path_checks, resources
from megatrain.verbs.start_checks import INIT_FROM, finished_step, ignored_keys, real, unreached_phases

REFUSED = (EXIT_BAD_CONFIG, EXIT_BAD_DATA, EXIT_BAD_CHECKPOINT)
"""Exit codes of a user's mistake."""

ERROR = "megatrain: error: "
"""How the line of an error begins."""


def start(config: TrainConfig, flags: Sequence[str], overrides: Sequence[str]) -> int:
    """Submit a training job (`launch=slurm`), or run this node's agent; return the exit code.

    `flags` and `overrides` are the command line's arguments; every rank is started with the same ones.
    """
    assert config.run.name is not None, "compose gives every run a name"
    step = slurm.Step.from_environ()
    if step is None and "--dry-run" not in flags:
        prepare_missing(config)
    if step is None and config.launch.name == "slurm":
        path_checks.check_paths(config, overrides)
        _say_notes(config, overrides)
        arguments = [*(flag for flag in flags if flag != "--dry-run"), *overrides]
        return slurm.submit(config.launch, config.run.name, arguments, dry_run="--dry-run" in flags)
    slurm.check_plain_start(config.launch, step)
    peers = step.meet(config.launch.timeout_s) if step else SingleNode()
    try:
        slurm.together(peers, lambda: _check(config, overrides))
        if peers.node == 0:
            _say_notes(config, overrides)
        if step is None and (done := finished_step(config)) is not None:
            show(nothing_to_do(config, done), sys.stdout)
            return EXIT_OK
        return start_workers(config, [*flags, *overrides], peers)
    finally:
        peers.close()


def prepare_missing(config: TrainConfig) -> None:
    """Prepare those sources of the demonstration corpus (`data=demo`) that the run mixes and that are not there yet."""
    if config.data.kind != "demo":
        return
    from megatrain.data.demo.corpus import missing_sources, prepare_demo

    if missing := missing_sources(config.data):
        say(f"preparing {', '.join(missing)} of the demonstration corpus first")
        prepare_demo(PrepareConfig(seed=config.seed, data=config.data, tokenizer=config.tokenizer))


def _check(config: TrainConfig, overrides: Sequence[str]) -> None:
    path_checks.check_paths(config, overrides)
    resources.check_gpus(config, has_gpu(config.launch.device))


def _say_notes(config: TrainConfig, overrides: Sequence[str]) -> None:
    """Say what a user may not expect of this command."""
    for warning in ignored_keys(config, overrides):
        say(f"warning: {warning}")
    for note in unreached_phases(config):
        say(f"note: {note}")
    _say_if_new(config, overrides)


def _say_if_new(config: TrainConfig, overrides: Sequence[str]) -> None:
    """Say that a start with another run's saved config begins a run of its own, which is not a resume."""
    given = read_overrides("train", list(overrides))
    run_dir = Path(config.run.dir) / str(config.run.name)
    if given.file is None or not (given.file.parent / EVENTS).exists():
        return
    source = given.file.parent
    continues = config.checkpoint.resume not in ("auto", "never") or list_checkpoints(run_dir / "checkpoints")
    if real(source) == real(run_dir) or continues or INIT_FROM in given.values:
        return
    weights = shlex.quote(quoted(INIT_FROM, str(source)))
    say(
        f"{config.run.name} is a new run, from step 0, with the config of {source}; to continue {source} instead: "
        f"megatrain train {shlex.quote(str(source))}; to start from its weights: add {weights}"
    )


def start_workers(config: TrainConfig, arguments: Sequence[str], peers: Peers) -> int:
    """Run `megatrain train` with `arguments` on `launch.nproc_per_node` ranks of this node; return the job's exit code.

    The agent of node 0 owns the run's folder on behalf of all nodes.
    """
    command = python_command("megatrain", "train", *arguments)
    run_dir = Path(config.run.dir) / str(config.run.name)
    on_gpu = has_gpu(config.launch.device)
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    limits = Limits(config.resilience.hang_timeout(on_gpu), config.launch.timeout_s)
    ownership = slurm.together(peers, lambda: Ownership.take(run_dir) if peers.node == 0 else None)
    try:
        keep_log(run_dir / "logs" / f"agent_{peers.node:05d}.log")
        if peers.node == 0:  # the ranks' first imports take seconds
            ranks = config.launch.nproc_per_node * peers.size
            say(f"starting {ranks} rank{'s' * (ranks > 1)} (log: {run_dir / 'logs' / log_name(0)})")
        for warning in resources.warnings(config, on_gpu) if peers.node == 0 else ():
            say(f"warning: {warning}")
        number = peers.all_gather(ownership.number if ownership else None)[0]
        owner = ownership or Ownership(run_dir / FOLDER, number)
        copies = config.checkpoint.copies_every(on_gpu) > 0
        since = time.monotonic() - process_age()
        modules = worker_modules(config)
        recovery = Recovery(
            run_dir,
            owner,
            config.resilience.max_restarts,
            config.resilience.max_machine_restarts,
            limits,
            copies=copies,
            modules=modules,
            can_move="SLURM_JOB_ID" in os.environ,
            since=since,
        )
        code = agent.launch(command, config.launch.nproc_per_node, run_dir / "logs", recovery, peers)
        if peers.node == 0 and run_dir in made and _is_refused(code, run_dir):
            _remove(made)
        return code
    finally:
        if ownership is not None:
            ownership.release()


def _is_refused(code: int, run_dir: Path) -> bool:
    """Return whether the ranks refused a new run before it began, and rank 0 has said why on the terminal.

    A requeue counts starts by the ledger in the folder, so under Slurm a fault of the machine is no refusal.
    """
    codes = REFUSED if "SLURM_JOB_ID" in os.environ else (*REFUSED, EXIT_ENVIRONMENT)
    if code not in codes or has_begun(run_dir):
        return False
    with suppress(OSError):
        return ERROR in (run_dir / "logs" / log_name(0)).read_text(encoding="utf-8", errors="replace")
    return False


def _remove(made: Sequence[Path]) -> None:
    """Remove the folder of a run that never began, and the folders above it that were made for it."""
    run_dir, *parents = made
    shutil.rmtree(run_dir, ignore_errors=True)
    for folder in parents:
        with suppress(OSError):  # something else is in it
            folder.rmdir()


def worker_modules(config: TrainConfig) -> list[str]:
    """Return the modules that a worker imports before its first step and that are safe to import before a fork.

    Modules that may initialise a GPU are left out, because a CUDA context does not survive a fork.
    """
    modules = [
        "megatrain.cli",
        "megatrain.config.compose",
        "megatrain.verbs.path_checks",
        "megatrain.verbs.value_checks",
        "megatrain.training.rank",
        "megatrain.engine.native",
    ]
    if config.engine.name == "deepspeed" and not has_gpu(config.launch.device):
        modules[-1] = "megatrain.engine.deepspeed"
        modules.append("deepspeed")
    return modules


def has_gpu(device: str) -> bool:
    """Return whether the workers will run on NVIDIA GPUs, without importing torch."""
    return device == "cuda" or (device == "auto" and any(Path("/dev").glob("nvidia[0-9]*")))

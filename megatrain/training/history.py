"""What a run's folder says of its past, and the refusals that follow from it. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatrain.checkpoint.naming import list_checkpoints
from megatrain.config import TrainConfig
from megatrain.errors import CheckpointError, ConfigError
from megatrain.tracking.events import read_events


def has_begun(run_dir: Path) -> bool:
    """Return whether a run's folder holds records of a run, and not only what starts leave that did not get that far.

    Those are logs, owners, the ledger, and records that were opened but have nothing in them.
    """
    files = [run_dir / name for name in ("config.yaml", "events.jsonl", "metrics.jsonl")]
    checkpoints = run_dir / "checkpoints"
    return any(file.exists() and file.stat().st_size for file in files) or (
        checkpoints.is_dir() and any(checkpoints.iterdir())
    )


def nothing_to_do(config: TrainConfig, step: int) -> str:
    """Return what a command says that continues a run at its last step, or beyond."""
    return (
        f"run {config.run.name} is at step {step} of train.steps={config.train.steps}: nothing to do. Raise "
        f"train.steps to continue it, or start another run.name"
    )


def refuse_to_overwrite(checkpoints: Path) -> None:
    """Refuse `checkpoint.resume=never` over existing checkpoints. Raises ConfigError."""
    if list_checkpoints(checkpoints):
        raise ConfigError(
            f"checkpoint.resume=never, but {checkpoints} already holds checkpoints, which a new run would "
            f"overwrite; choose another run.name, remove the folder, or use checkpoint.resume=auto"
        )


def refuse_if_lost(run_dir: Path) -> None:
    """Refuse to start a run anew that has saved checkpoints, none of which is left. Raises CheckpointError."""
    checkpoints = run_dir / "checkpoints"
    if list_checkpoints(checkpoints):
        return
    step = last_saved_step(run_dir / "events.jsonl")
    if step is not None:
        raise CheckpointError(
            f"run {run_dir.name} had a checkpoint of step {step}, but {checkpoints} holds none: all of them were moved "
            f"or deleted; put them back, or give checkpoint.resume=never to start anew at step 1"
        )


def last_saved_step(events: Path) -> int | None:
    """Return the step of the last checkpoint that the run saved or continued since it last began anew; None if none.

    A copy in memory is no checkpoint: its loss with the machine is not a deletion.
    """
    if not events.exists():
        return None
    step: int | None = None
    for event in read_events(events):
        kind: Any = event["kind"]
        if kind == "start":
            step = None
        elif kind in ("save", "rescue") or (kind == "resume" and "copy" not in event):
            step = event.get("step")
    return step

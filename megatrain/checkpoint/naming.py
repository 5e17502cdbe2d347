"""Name checkpoint folders, and list the checkpoints of a run. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

TEMPORARY = ".writing"
"""Suffix of a folder that is not yet, or no longer, a checkpoint."""

VALUE = "value."
"""How the names of a value head's parameters begin."""

_NAME = re.compile(r"step_(\d{8,})$")


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step`."""
    return f"step_{step:08d}"


def parameter_key(name: str) -> str:
    """Return the key of a parameter's tensor in a checkpoint: `model.<name>`.

    A value head is training's alone. It has a key of its own, `critic.<name>`, which nobody loads with the model.
    """
    return f"critic.{name.removeprefix(VALUE)}" if name.startswith(VALUE) else f"model.{name}"


def checkpoint_step(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name; None for any other folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run's `checkpoints/` folder, newest first, without verifying them."""
    found = [path for path in folder.glob("step_*") if checkpoint_step(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: checkpoint_step(path) or 0, reverse=True)

"""Which paths are offered to a user who has to name one: in messages about one that is missing, and in completion.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from megatrain.checkpoint.naming import list_checkpoints
from megatrain.config.suggest import did_you_mean, nearest_path
from megatrain.config.values import exists
from megatrain.errors import ConfigError

OF_RUNS = ("path", "paths", "base", "ensemble", "run folder", "checkpoint.resume", "checkpoint.init_from", "judge")
"""Keys whose value is the folder of a run, a checkpoint, a dataset or a Hugging Face model."""

OTHERS = ("logs", "mlartifacts", "owner", "profile")
"""Folders that megatrain makes in and beside those of runs, and that are none themselves."""


def is_offered(entry: Path) -> bool:
    """Return whether an existing path may be, or lead to, the folder of a run, a checkpoint, a dataset or a model.

    A run's folder without a step is of no use to any verb.
    """
    if not entry.is_dir() or (entry.name in OTHERS and not (entry / "config.yaml").is_file()):
        return False
    return not (entry / "owner").is_dir() or has_steps(entry)


def has_steps(run_dir: Path) -> bool:
    """Return whether a run's folder records a step or holds a checkpoint."""
    metrics = run_dir / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or bool(list_checkpoints(run_dir / "checkpoints"))


def require(key: str, path: Path, also: tuple[str, ...] = ()) -> None:
    """Refuse a path that does not exist, and suggest one that does. `also` lists allowed values that are not paths."""
    if exists(str(path)):
        return
    parent = path.parent
    while not exists(str(parent)) or not parent.is_dir():
        parent = parent.parent
    try:
        entries = sorted(entry for entry in parent.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{key}={path}: {parent} cannot be read ({error.strerror})") from error
    names = [entry.name for entry in entries if key not in OF_RUNS or is_offered(entry)]
    hint = did_you_mean("", str(path), also)
    if not hint and path.parent == parent:
        hint = did_you_mean("" if str(parent) == "." else f"{parent}/", path.name, names)
    elif not hint and (near := nearest_path(str(path))):
        hint = f"; did you mean {near}?"
    contents = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    contents = contents or ("none" if entries else "nothing")
    raise ConfigError(f"{key}={path}: no such file or folder{hint} ({parent.resolve()} holds {contents})")

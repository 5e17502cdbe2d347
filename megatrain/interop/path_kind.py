"""What a path holds, by file names alone, and where a run keeps its checkpoints. Imports no torch.

So a path that a verb does not take is refused before anything heavy is imported.
"""

from __future__ import annotations

from pathlib import Path

from megatrain.checkpoint.manifest import MANIFEST
from megatrain.checkpoint.naming import checkpoint_step, list_checkpoints
from megatrain.data.card import CARD
from megatrain.errors import ConfigError


def kind_of(path: Path) -> str:
    """Return what a path holds, by file names alone: `checkpoint`, `dataset`, `huggingface`, `run` or `unknown`."""
    if (path / MANIFEST).exists() or checkpoint_step(path) is not None:
        return "checkpoint"
    if (path / CARD).exists():
        return "dataset"
    if any((path / name).exists() for name in ("config.json", "model.safetensors", "model.safetensors.index.json")):
        return "huggingface"
    if (path / "checkpoints").is_dir() or (path / "config.yaml").exists() or list_checkpoints(path):
        return "run"
    return "unknown"


def checkpoints_folder(run: Path) -> Path:
    """Return the folder of a run's checkpoints: `run` itself if it has no `checkpoints/`."""
    return run / "checkpoints" if (run / "checkpoints").is_dir() else run


def find_checkpoint(path: Path, step: int) -> Path:
    """Return the checkpoint of a run's `step`, without verifying it.

    Raises:
        ConfigError: the path is no run, or the run keeps no checkpoint of that step; the message names those it keeps.
    """
    if kind_of(path) != "run":
        raise ConfigError(f"step={step} chooses a checkpoint of a run, but path={path} is no run; leave step out")
    found = {checkpoint_step(folder): folder for folder in list_checkpoints(checkpoints_folder(path))}
    if step not in found:
        kept = ", ".join(str(number) for number in sorted(n for n in found if n is not None)) or "none"
        raise ConfigError(f"{path}: no checkpoint of step {step} (there are: {kept})")
    return found[step]

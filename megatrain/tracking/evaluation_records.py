"""Results in the folder of a run: `evaluations/step_<step>/<name>.json`, one file a task, replaced when it is repeated.

A checkpoint that belongs to no run, as of a merge, has them in its own folder. Imports no torch.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from megatrain.resilience.atomic_file import write_atomically
from megatrain.tracking.metrics import now, to_json

FOLDER = "evaluations"

_FORBIDDEN = re.compile(r"[^\w.+-]")
"""What stands in no file's name: a task may be called `mmlu/law`."""


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to; None if it belongs to none."""
    run_dir = checkpoint.resolve().parent.parent
    return (
        run_dir if checkpoint.resolve().parent.name == "checkpoints" and (run_dir / "config.yaml").is_file() else None
    )


def records_folder(checkpoint: Path) -> Path:
    """Return the folder that keeps the results of a checkpoint: its run's, or its own if it belongs to none."""
    return run_folder_of(checkpoint) or checkpoint


def write_record(run_dir: Path, step: int, kind: str, name: str, record: dict[str, Any]) -> Path:
    """Write the result of one evaluation of a run's checkpoint, and return the file."""
    place = run_dir / FOLDER / f"step_{step:08d}" / f"{_FORBIDDEN.sub('_', name)}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, to_json({"kind": kind, "name": name, "step": step, "time": now(), **record}) + "\n")
    return place


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the results in a run's folder by step and name, without those that cannot be read."""
    found = []
    for path in sorted((run_dir / FOLDER).glob("step_*/*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("name"), str):
            found.append(record)
    return found

"""`megatrain.Run`: what a run's folder says, as tables. It only reads, so the run may be training meanwhile."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from megatrain.api.folder_argument import existing_path
from megatrain.checkpoint.manifest import read_manifest
from megatrain.checkpoint.naming import checkpoint_step, list_checkpoints
from megatrain.config.choices import read_yaml
from megatrain.errors import CheckpointError, ConfigError
from megatrain.report.run_page import RECORDS, report
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import read_metrics

if TYPE_CHECKING:
    from megatrain.api.trained_model import TrainedModel

CHECKPOINT_COLUMNS = ("path", "tokens", "engine", "world_size")


class Run:
    """A run's folder. Every property reads the files anew, so a table of a running job grows."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """`path` is the folder, `<run.dir>/<run.name>`.

        Raises:
            ConfigError: there is no such folder, or it is not that of a run.
        """
        self.path = existing_path(path)
        if not any((self.path / name).exists() for name in RECORDS):
            raise ConfigError(f"{self.path}: not a run's folder; it has none of {', '.join(RECORDS)}")

    def __repr__(self) -> str:
        steps = [step for step in map(checkpoint_step, list_checkpoints(self.path / "checkpoints")) if step is not None]
        return f"Run({str(self.path)!r}: {len(self.metrics)} steps, checkpoints of steps {sorted(steps)})"

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config as nested dicts; empty if the run has not written it yet.

        Raises:
            ConfigError: config.yaml is damaged.
        """
        path = self.path / "config.yaml"
        return read_yaml(path)[0] if path.exists() else {}

    @property
    def metrics(self) -> pd.DataFrame:
        """One row per finished optimizer step, indexed by `step`: `loss`, `lr`, `heldout_loss`, `tokens_per_s`, …

        docs/reference/records.md explains the columns. `time` is a timestamp in UTC.

        Raises:
            DataError: metrics.jsonl is damaged.
        """
        path = self.path / "metrics.jsonl"
        records = read_metrics(path) if path.exists() else []
        return _timed(pd.DataFrame(records or {"step": []})).set_index("step")

    @property
    def events(self) -> pd.DataFrame:
        """One row per event, in the order written: `time`, `kind`, `step`, and `detail` with the other fields."""
        path = self.path / "events.jsonl"
        rows = [
            {
                "time": event.get("time"),
                "kind": event["kind"],
                "step": event.get("step"),
                "detail": {name: value for name, value in event.items() if name not in ("time", "kind", "step")},
            }
            for event in (read_events(path) if path.exists() else [])
        ]
        return _timed(pd.DataFrame(rows, columns=["time", "kind", "step", "detail"]))

    @property
    def checkpoints(self) -> pd.DataFrame:
        """One row per checkpoint, indexed by `step`, oldest first: `path`, `tokens`, `engine` and `world_size`.

        Files are not verified (`load` does that). A checkpoint whose manifest cannot be read is left out.
        """
        rows = []
        for folder in reversed(list_checkpoints(self.path / "checkpoints")):
            try:
                manifest = read_manifest(folder)
            except CheckpointError:
                continue
            layout = manifest.identity.layout or {}
            rows.append(
                (manifest.step, folder, manifest.progress.tokens, manifest.identity.engine, layout.get("world_size"))
            )
        return pd.DataFrame(rows, columns=["step", *CHECKPOINT_COLUMNS]).set_index("step")

    def load(self, step: int | None = None, device: str = "auto") -> TrainedModel:
        """Load the model of the checkpoint of `step`, or of the newest intact one; see `megatrain.load`.

        Raises:
            ConfigError: `step` is no number, or there is no checkpoint of that step.
            CheckpointError: it is damaged, or no checkpoint is intact.
        """
        from megatrain.api.trained_model import load

        return load(self.path, device, step=step)

    def report(self) -> Path:
        """Write the run's page, `report.html` in its folder, and return its path."""
        return report(self.path)


def _timed(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with its ISO 8601 column `time` as timestamps."""
    if "time" in table:
        table["time"] = pd.to_datetime(table["time"], utc=True, format="ISO8601")
    return table

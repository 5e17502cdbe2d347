"""Cross-validation: a run for each fold of a small data set, and what they say together. Imports no torch.

The runs are the points of a sweep over `data.fold`, which `multirun.py` starts and continues like any other.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatrain.config.compose import read_overrides
from megatrain.errors import DataError
from megatrain.resilience.atomic_file import write_atomically
from megatrain.tracking.metrics import iter_metrics
from megatrain.verbs.sweep_points import FOLD, Point, last_value

FILE = "folds.json"
"""What the folds say together, in the sweep's folder."""

FOLDS = "data.folds"
"""The key of the number of folds."""

METRICS = ("heldout_loss", "heldout_accuracy")
"""Metrics that are shown of each fold, where the method has them."""


@dataclass
class Fold:
    """A fold's run, and its metrics after its last step; empty until it is done."""

    fold: int
    run: str
    metrics: dict[str, float]


@dataclass
class Setting:
    """The folds of one combination of the other swept values, the mean of each metric and its standard error.

    Both are empty until all folds are done. The runs share most of their data, so their losses are not independent, and
    the standard error (standard deviation / square root of the number) is a rough one.
    """

    values: dict[str, str]
    folds: list[Fold]
    mean: dict[str, float]
    standard_error: dict[str, float]


def asks_for_folds(overrides: Sequence[str]) -> bool:
    """Return whether a command of `tune` is to train a run for each fold."""
    return last_value(overrides, FOLD) is None and last_value(overrides, FOLDS) not in (None, "null")


def number_of_folds(overrides: Sequence[str]) -> int:
    """Return `data.folds` of a command line. Raises ConfigError if it is no number of folds."""
    words = [text for text in overrides if text.partition("=")[0].strip().lstrip("+") == FOLDS]
    return int(read_overrides("tune", words).values[FOLDS])


def summarise(points: Sequence[Point], done: Sequence[bool]) -> list[Setting]:
    """Return what the folds of each setting say; of points that are not done nothing."""
    settings: dict[str, Setting] = {}
    for point, is_done in zip(points, done, strict=True):
        values = {key: value for key, value in point.values.items() if key != FOLD}
        setting = settings.setdefault(json.dumps(values), Setting(values, [], {}, {}))
        metrics = _last_metrics(point.folder) if is_done else {}
        setting.folds.append(Fold(point.config.data.fold or 0, str(point.config.run.name), metrics))
    for setting in settings.values():
        for name in METRICS:
            found = [fold.metrics[name] for fold in setting.folds if name in fold.metrics]
            if len(found) == len(setting.folds) > 1:
                setting.mean[name] = statistics.fmean(found)
                setting.standard_error[name] = statistics.stdev(found) / math.sqrt(len(found))
    return list(settings.values())


def save(folder: Path, settings: Sequence[Setting]) -> None:
    """Write the summary into the sweep's folder."""
    write_atomically(folder / FILE, json.dumps([asdict(setting) for setting in settings], indent=1) + "\n")


def table(settings: Sequence[Setting]) -> str:
    """Return the folds of each setting as a table, with their mean and its standard error."""
    lines = []
    for setting in settings:
        names = [name for name in METRICS if any(name in fold.metrics for fold in setting.folds)] or [METRICS[0]]
        rows = [["fold", *(name.replace("heldout_", "held-out ") for name in names)]]
        rows += [[str(fold.fold), *(_shown(fold.metrics.get(name)) for name in names)] for fold in setting.folds]
        for what, of in (("mean", setting.mean), ("standard error", setting.standard_error)):
            rows.append([what, *(_shown(of.get(name)) for name in names)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        label = " ".join(f"{key}={value}" for key, value in setting.values.items())
        lines += ["", *([label] if label else [])]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells))
    return "\n".join(lines)


def scores(settings: Sequence[Setting]) -> dict[str, float]:
    """Return means and standard errors by a name, for MLflow: that of the setting too if there are several."""
    found: dict[str, float] = {}
    for setting in settings:
        label = "".join(f"/{key}={value}" for key, value in setting.values.items()) if len(settings) > 1 else ""
        found |= {f"{name}_mean{label}": value for name, value in setting.mean.items()}
        found |= {f"{name}_se{label}": value for name, value in setting.standard_error.items()}
    return found


def _last_metrics(run_dir: Path) -> dict[str, float]:
    """Return the held-out metrics of a run's last evaluation."""
    found: dict[str, float] = {}
    try:
        for record in iter_metrics(run_dir / "metrics.jsonl"):
            if METRICS[0] in record:
                found = {name: float(record[name]) for name in METRICS if record.get(name) is not None}
    except (OSError, DataError):
        return {}
    return found


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

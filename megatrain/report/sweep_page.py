"""`megatrain report <sweep>`: show the points of a sweep on one HTML page, as a table and as loss against compute.

Everything is read from the runs' own folders, so the page can be made while points are still running. Imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from megatrain.config import ModelConfig
from megatrain.errors import MegatrainError
from megatrain.model.count import flops_per_token, num_parameters
from megatrain.report.page import SWEEP_PAGE, write_page
from megatrain.report.run_page import RECORDS, Curves, report, round_for_plot, status
from megatrain.tracking.events import read_events
from megatrain.tracking.sweep_record import SweepPoint, SweepRecord

MAX_POINTS = 300
"""Most points per curve; fewer than on a run's page, because the sweep has a curve per run."""


def report_sweep(folder: Path, out: Path | None = None) -> Path:
    """Write the page of the sweep in `folder` to `out` (default `<folder>/report.html`) and return its path.

    Raises:
        DataError: the sweep's record cannot be read.
    """
    out = out or folder / "report.html"
    return write_page(SWEEP_PAGE, collect(folder, out.parent), out)


def collect(folder: Path, page_folder: Path | None = None) -> dict[str, Any]:
    """Return everything that the page in `page_folder` (default `folder`) shows, ready for JSON.

    A point's compute is the forward and backward FLOPs of all its trained tokens, as for MFU (`model/count.py`).
    """
    points = SweepRecord.load(folder).points
    keys = list(dict.fromkeys(key for point in points for key in point.values))
    return {
        "name": folder.resolve().name,
        "keys": keys,
        "points": [
            describe(folder.parent / point.run, point, keys)
            | {
                "short": short_name(point.run, folder.resolve().name),
                "page": page_of(folder.parent / point.run, page_folder or folder),
            }
            for point in points
        ],
    }


def short_name(run: str, sweep: str) -> str:
    """Return a run's name without what it shares with the beginning of its sweep's name, such as model and data."""
    parts, shared = run.split("-"), 0
    for part, other in zip(parts[:-1], sweep.split("-"), strict=False):
        if part != other:
            break
        shared += 1
    return "-".join(parts[shared:])


def page_of(run_dir: Path, page_folder: Path) -> str | None:
    """Return the link from a page in `page_folder` to the page of a run, written anew if the run went on since.

    None if the run has not started or its page cannot be written.
    """
    page = run_dir / "report.html"
    try:
        records = [path.stat().st_mtime for name in RECORDS if (path := run_dir / name).exists()]
        if not records:
            return None
        if not page.exists() or page.stat().st_mtime < max(records):
            report(run_dir)
    except (OSError, MegatrainError):
        if not page.exists():
            return None
    return quote(os.path.relpath(page.absolute(), page_folder.absolute()))


def describe(run_dir: Path, point: SweepPoint, keys: list[str]) -> dict[str, Any]:
    """Return a point's table row and curves. Values that are not known yet are None."""
    config = read_config(run_dir / "config.yaml")
    curves = Curves(run_dir / "metrics.jsonl", MAX_POINTS)
    events = read_events(run_dir / "events.jsonl") if (run_dir / "events.jsonl").exists() else []
    parameters = per_token = None
    try:
        model = ModelConfig(**config["model"])
        parameters, per_token = num_parameters(model), flops_per_token(model, config["train"]["seq_len"])
    except (KeyError, TypeError, AssertionError):
        pass  # the run has not started, or its config.yaml is damaged

    def compute(tokens: int | None) -> int | None:
        return None if tokens is None or per_token is None else tokens * per_token

    tokens = curves.last.get("tokens")
    loss = curves.curves.get("loss", {}).get("mean", [])
    stretches = zip(curves.steps, curves.tokens, loss, strict=False)
    return {
        "run": point.run,
        "values": [point.values.get(key, value_of(config, key)) for key in keys],
        "parameters": parameters,
        "tokens": tokens,
        "compute": compute(tokens),
        "loss": curves.last_loss,
        "heldout": curves.heldout[-1][3] if curves.heldout else None,
        "status": status(run_dir, events, curves) if run_dir.is_dir() else {"text": "not started", "tone": "plain"},
        "train_curve": [[compute(seen), value, step] for step, seen, value in stretches],
        "heldout_curve": [[compute(seen), round_for_plot(value), step] for step, _, seen, value in curves.heldout],
        "notice": curves.damage,
    }


def read_config(path: Path) -> dict[str, Any]:
    """Return a run's config, or an empty dict if the file is missing or damaged."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def value_of(config: dict[str, Any], key: str) -> str | None:
    """Return a run's value of a dotted key (for a config group, its name), or None if it has none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, dict):
        value = value.get("name")
    return None if value is None else str(value)

"""Scores on tasks and examples as a table: in a run's page, and in a page of several models. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatrain.report.page import SCORES_PAGE, write_page
from megatrain.tracking.evaluation_records import read_records

MOST_STEPS = 8
"""Most checkpoints of a run that its page shows, the newest ones."""


def scores_page(models: Mapping[str, Sequence[Mapping[str, Any]]], note: str, out: Path) -> Path:
    """Write a page with a column for each model; `models` has each one's results by its name. Return `out`.

    A result has `name`, `documents`, and `scores` as `evaluation.results.Score` has them.

    Raises:
        ConfigError: `out` is a file other than a report page, or cannot be written.
        EnvironmentFault: its disk is full or broken.
    """
    name = " and ".join(models) if len(models) < 3 else f"{len(models)} models"
    return write_page(SCORES_PAGE, {"name": f"Scores of {name}", "scores": table_of(models, note)}, out)


def scores_of_run(run_dir: Path) -> dict[str, Any] | None:
    """Return the table of a run's evaluations, a column for each checkpoint; None if it has none."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in read_records(run_dir):
        by_step.setdefault(record["step"], []).append(record)
    steps = sorted(by_step)[-MOST_STEPS:]
    if not steps:
        return None
    note = "megatrain evaluate, by step of the checkpoint; after ± one standard error, in brackets the 95% interval"
    return table_of({f"step {step:,}": by_step[step] for step in steps}, note)


def table_of(models: Mapping[str, Sequence[Mapping[str, Any]]], note: str) -> dict[str, Any]:
    """Return columns and rows: a row for each metric of each task that any model has a result of."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for column, results in enumerate(models.values()):
        for result in results:
            for score in _scores(result):
                key = f"{score['metric']}.{score['variant']}" if score.get("variant") else str(score["metric"])
                row = rows.setdefault(
                    (str(result.get("name")), key),
                    {
                        "task": str(result.get("name")),
                        "metric": key,
                        "better": score.get("higher_is_better"),
                        "documents": result.get("documents"),
                        "cells": [None] * len(models),
                    },
                )
                row["cells"][column] = {"value": score["value"], "range": _range(score)}
    notes = [
        f"{name}: {result.get('name')}: {text}"
        for name, results in models.items()
        for result in results
        for text in (result.get("detail") or {}).get("notes", ())
    ]
    return {"columns": list(models), "rows": list(rows.values()), "note": note, "notes": notes}


def _scores(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the scores of a result that can be shown; a file may be from another program."""
    found = result.get("scores")
    known = found if isinstance(found, list) else []
    return [one for one in known if isinstance(one, dict) and isinstance(one.get("value"), (int, float))]


def _range(score: Mapping[str, Any]) -> str:
    """Return what stands after a value: its interval or its standard error, if it has one."""
    if interval := score.get("interval"):
        return f"[{interval[0]:.4f}, {interval[1]:.4f}]"
    return "" if score.get("stderr") is None else f"± {score['stderr']:.4f}"

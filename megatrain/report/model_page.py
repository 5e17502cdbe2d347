"""`megatrain report <model>`: the page of a model that is no run: merged, compressed, imported or exported.

It shows the models that it came from, and what each was scored. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatrain.checkpoint.lineage import find_line
from megatrain.report.lineage_section import lineage, records_of
from megatrain.report.page import MODEL_PAGE, write_page
from megatrain.report.scores_page import table_of
from megatrain.tracking.evaluation_records import read_records

NOTE = "each model of the line at the step that the next one was made of; after ± one standard error"


def report_model(path: Path, out: Path | None = None) -> Path:
    """Write the page of the model at `path` to `out` (default `<path>/report.html`) and return its path.

    Raises:
        CheckpointError: the folder says nothing of where the model came from.
    """
    boxes = lineage(path, with_scores=False)  # the table below has them
    data = {"name": path.resolve().name, "lineage": boxes, "scores": _scores(path)}
    return write_page(MODEL_PAGE, data, out or path / "report.html")


def _scores(path: Path) -> dict[str, Any] | None:
    """Return the table of the line's scores, a column for each model that has any; None if none has."""
    columns: dict[str, list[dict[str, Any]]] = {}
    for one in find_line(path):
        place = records_of(one)
        found = [record for record in read_records(place) if record["step"] == one.step] if place else []
        if found:
            columns[one.name] = found
    return table_of(columns, NOTE) if columns else None

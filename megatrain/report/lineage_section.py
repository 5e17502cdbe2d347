"""The section of a run's page that shows where its model came from: data, tokenizer, and the models before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatrain.checkpoint.find import peek
from megatrain.checkpoint.lineage import line_of
from megatrain.checkpoint.manifest import Ancestor
from megatrain.data.card import CARD, Card
from megatrain.errors import CheckpointError, DataError
from megatrain.tracking.metrics import iter_metrics

MOST_SCORES = 6
"""Most scores that a box shows."""


def lineage(run_dir: Path) -> list[dict[str, Any]]:
    """Return a box for each artifact, the first one first; empty if the run began from nothing.

    A box has its `name`, what it is (`by`), where its weights are `from`, and `figures` as pairs of texts. Figures of
    models whose folders are gone are missing.
    """
    found = peek(run_dir)
    if found is None or not found[1].identity.ancestors:
        return []
    line = line_of(*found)
    names = {one.checksum: one.name for one in line}
    boxes = [_model(one, names) for one in line]
    return [*_data(found[1].identity.config, line), *boxes]


def _model(one: Ancestor, names: dict[str, str]) -> dict[str, Any]:
    parents = [names[parent] for parent in one.parents if parent in names]
    figures = [["steps", f"{one.step:,}"], ["data", one.data or ""]]
    run_dir = Path(one.folder).parent.parent
    if (loss := _heldout_loss(run_dir / "metrics.jsonl", one.step)) is not None:
        figures.append(["held-out loss", f"{loss:.4f}"])
    figures += scores_of(run_dir, one.step)
    made_from = ", ".join(parents) or one.imported_from or ""
    return {"name": one.name, "by": one.by, "from": made_from, "figures": [pair for pair in figures if pair[1]]}


def _data(config: dict[str, Any], line: list[Ancestor]) -> list[dict[str, Any]]:
    """Return the boxes of the first model's dataset and tokenizer, if the dataset is still there."""
    first, folder = line[0], Path(str((config.get("data") or {}).get("dir", "data")))
    place = folder / (first.data or "")
    if not first.data or not (place / CARD).is_file():
        return []
    try:
        card = Card.load(place)
    except (DataError, CheckpointError):
        return []
    figures = [[name, f"{split.tokens:,} tokens"] for name, split in card.splits.items()]
    boxes = [{"name": first.data, "by": "data", "from": "", "figures": figures}]
    if card.tokenizer is not None:
        known = card.tokenizer
        figures = [["vocabulary", f"{known.vocab_size:,}"], ["fingerprint", known.fingerprint[:8]]]
        boxes.append({"name": known.kind, "by": "tokenizer", "from": first.data, "figures": figures})
    return boxes


def _heldout_loss(path: Path, step: int) -> float | None:
    """Return the last held-out loss of a run up to a step; None if there is none, or it cannot be read."""
    loss = None
    try:
        for record in iter_metrics(path):
            if record["step"] > step:
                break
            if isinstance(record.get("heldout_loss"), float):
                loss = record["heldout_loss"]
    except (OSError, DataError):
        return loss
    return loss


def scores_of(run_dir: Path, step: int) -> list[list[str]]:
    """Return the scores that `megatrain evaluate` and scripts wrote for a step of a run, as names and values."""
    found: list[list[str]] = []
    for path in sorted((run_dir / "evaluations" / f"step_{step:08d}").glob("*.json")):
        try:
            for score in json.loads(path.read_text(encoding="utf-8"))["scores"]:
                error = "" if score.get("stderr") is None else f" ± {score['stderr']:.3f}"
                found.append([str(score["metric"]), f"{score['value']:.3f}{error}"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found[:MOST_SCORES]

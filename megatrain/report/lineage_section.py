"""The section of a run's page that shows where its model came from: data, tokenizer, and the models before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatrain.checkpoint.find import peek
from megatrain.checkpoint.lineage import as_ancestor, find_line
from megatrain.checkpoint.manifest import Ancestor
from megatrain.data.card import CARD, Card
from megatrain.errors import CheckpointError, DataError
from megatrain.tracking.evaluation_records import records_folder
from megatrain.tracking.metrics import iter_metrics

MOST_SCORES = 6
"""Most scores that a box shows."""


def lineage(path: Path, with_scores: bool = True) -> list[dict[str, Any]]:
    """Return a box for each artifact that a model came from, and the model's own, the first one first.

    A box has its `name`, what it is (`by`), where its weights are `from`, its `generation` (one more than the latest
    of those it came from), and `figures` as pairs of texts. Figures of models whose folders are gone are missing.
    """
    line = find_line(path)
    if not line:
        return []
    names = {one.checksum: one.name for one in line}
    data = _data(path, line)
    generations: dict[str, int] = {}
    for one in line:
        generations[one.checksum] = max((generations.get(parent, 0) + 1 for parent in one.parents), default=len(data))
    return [*data, *(_model(one, names, generations[one.checksum], with_scores) for one in line)]


def _model(one: Ancestor, names: dict[str, str], generation: int, with_scores: bool) -> dict[str, Any]:
    parents = [names[parent] for parent in one.parents if parent in names]
    figures = [["steps", f"{one.step:,}" if one.step else ""], ["data", one.data or ""]]
    if (place := records_of(one)) is not None:
        if (loss := _heldout_loss(place / "metrics.jsonl", one.step)) is not None:
            figures.append(["held-out loss", f"{loss:.4f}"])
        figures += scores_of(place, one.step) if with_scores else []
    made_from = ", ".join(parents) or one.imported_from or ""
    shown = [pair for pair in figures if pair[1]]
    return {"name": one.name, "by": one.by, "from": made_from, "generation": generation, "figures": shown}


def records_of(one: Ancestor) -> Path | None:
    """Return the folder with the records of a model; None if another model has taken its place."""
    folder = Path(one.folder)
    found = peek(folder)
    if found is not None and as_ancestor(*found).checksum != one.checksum:
        return None
    return records_folder(folder)


def _data(path: Path, line: list[Ancestor]) -> list[dict[str, Any]]:
    """Return the boxes of the first model's dataset and tokenizer, if the dataset is still there."""
    found = peek(path)
    config = found[1].identity.config if found else {}
    first, folder = line[0], Path(str((config.get("data") or {}).get("dir", "data")))
    place = folder / (first.data or "")
    if not first.data or not (place / CARD).is_file():
        return []
    try:
        card = Card.load(place)
    except (DataError, CheckpointError):
        return []
    figures = [[name, f"{split.tokens:,} tokens"] for name, split in card.splits.items()]
    boxes = [{"name": first.data, "by": "data", "from": "", "generation": 0, "figures": figures}]
    if card.tokenizer is not None:
        known = card.tokenizer
        figures = [["vocabulary", f"{known.vocab_size:,}"], ["fingerprint", known.fingerprint[:8]]]
        boxes.append({"name": known.kind, "by": "tokenizer", "from": first.data, "generation": 1, "figures": figures})
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

"""Which of two models answers better, as a judge scores their replies to the same prompts; or how one does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.errors import DataError
from megatrain.evaluation.intervals import bootstrap
from megatrain.evaluation.results import Score


def read_prompts(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read a file of JSON lines with `prompt`, the first `limit` of them; further fields are for the judge.

    Raises DataError, with the line, for a record without a prompt, or with other fields than the first one.
    """
    found: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if limit is not None and len(found) == limit:
                    break
                if line.strip():
                    found.append(_prompt(f"{path}, line {number}", line))
                    if found[-1].keys() != found[0].keys():
                        names = ", ".join(sorted(found[-1].keys() ^ found[0].keys()))
                        raise DataError(f"{path}, line {number}: its fields differ from those of the first ({names})")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not found:
        raise DataError(f"{path}: holds no prompts; give JSON lines with prompt")
    return found


def _prompt(place: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error})") from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{place}: prompt is {json.dumps(prompt)[:40]}; give the text of the question")
    found: dict[str, Any] = record
    return found


def mean_score(scores: Sequence[float], seed: int) -> Score:
    """Return the mean of the judge's scores of a model's replies, with the bootstrap's interval of 95%."""
    points = np.asarray(scores, float)
    low, high = bootstrap(lambda chosen: points[chosen].mean(), len(points), seed)
    return Score("score", float(points.mean()), None, True, interval=(float(low), float(high)))


def compare(ours: Sequence[float], theirs: Sequence[float], seed: int) -> tuple[list[Score], dict[str, Any]]:
    """Return how the first model's replies, with these scores of the judge, do against the second's.

    The win rate counts a tie as half a win. Its interval, and that of the mean difference of the scores, are the 95%
    percentiles of the bootstrap over the prompts, which keeps the two replies to a prompt together.
    """
    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    points = np.stack([(np.sign(difference) + 1) / 2, difference], axis=1)
    edges = bootstrap(lambda chosen: points[chosen].mean(0), len(points), seed)
    scores = [
        Score(
            name, float(points[:, place].mean()), None, True, interval=(float(edges[0, place]), float(edges[1, place]))
        )
        for place, name in enumerate(("win_rate", "score_difference"))
    ]
    counts = {
        "wins": int((difference > 0).sum()),
        "ties": int((difference == 0).sum()),
        "losses": int((difference < 0).sum()),
    }
    return scores, {**counts, "mean_scores": [float(np.mean(ours)), float(np.mean(theirs))]}

"""Classification and extraction: prompts with a right answer, and how well a model's answers agree.

Scores of labels are scikit-learn's. Intervals are of 95%: Wilson's of the accuracy, the bootstrap's of the rest.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.errors import DataError
from megatrain.evaluation.intervals import bootstrap, wilson
from megatrain.evaluation.results import Score

OTHER = "(none of these)"
"""The class of answers that are none of the labels."""


@dataclass(frozen=True)
class Example:
    """A question and its right answer."""

    prompt: str
    label: str


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """Read a file of JSON lines with `prompt` and `label`, the first `limit` of them.

    Raises DataError, with the line, for a record without them, and for a file without any.
    """
    found: list[Example] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if limit is not None and len(found) == limit:
                    break
                found.append(_example(f"{path}, line {number}", line))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not found:
        raise DataError(f"{path}: holds no examples; give JSON lines with prompt and label")
    return found


def _example(place: str, line: str) -> Example:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{place}: not a JSON object; give prompt and label")
    prompt, label = record.get("prompt"), record.get("label")
    if not isinstance(prompt, str) or not prompt:
        raise DataError(f"{place}: prompt is {json.dumps(prompt)[:40]}; give the text of the question")
    if isinstance(label, (bool, int)):
        label = json.dumps(label)
    if not isinstance(label, str) or not label.strip():
        raise DataError(f"{place}: label is {json.dumps(label)[:40]}; give the text of the right answer")
    return Example(prompt, label.strip())


def classify(labels: Sequence[str], answers: Sequence[str], seed: int) -> tuple[list[Score], dict[str, Any]]:
    """Return the scores of answers to questions with these labels, and the detail: figures by label, and the confusion.

    Answers that are no label are of the class `OTHER`. `confusion[i][j]` counts questions of label `i` that got `j`.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    known = sorted(set(labels))
    answered = [answer if answer in known else OTHER for answer in answers]
    classes = [*known, *([OTHER] if OTHER in answered else [])]
    precision, recall, f1, support = precision_recall_fscore_support(labels, answered, labels=known, zero_division=0)
    number = {name: place for place, name in enumerate([*known, OTHER])}
    pairs = np.array([[number[label], number[answer]] for label, answer in zip(labels, answered, strict=True)])
    edges = bootstrap(lambda chosen: _macro(pairs[chosen], len(known)), len(pairs), seed)
    hits = sum(label == answer for label, answer in zip(labels, answered, strict=True))
    values = {"precision": precision.mean(), "recall": recall.mean(), "f1": f1.mean()}
    scores = [Score("accuracy", hits / len(labels), None, True, interval=wilson(hits, len(labels)))]
    for place, (name, value) in enumerate(values.items()):
        interval = (float(edges[0][place]), float(edges[1][place]))
        scores.append(Score(f"{name}_macro", float(value), None, True, interval=interval))
    detail = {
        "by_label": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "examples": int(n)}
            for name, p, r, f, n in zip(known, precision, recall, f1, support, strict=True)
        },
        "classes": classes,
        "confusion": confusion_matrix(labels, answered, labels=classes).tolist(),
        "intervals": "95%: accuracy by Wilson's score, macro means by 2,000 bootstrap resamples of the examples",
    }
    return scores, detail


def _macro(pairs: np.ndarray, count: int) -> np.ndarray:
    """Return the macro means of precision, recall and F1 of pairs (label, answer), `[n, 2]`, over `count` labels.

    A label that neither a question nor an answer of the resample has is left out.
    """
    table = np.zeros((count + 1, count + 1))
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    right, asked, told = np.diag(table)[:count], table.sum(1)[:count], table.sum(0)[:count]
    there = (asked + told) > 0
    precision, recall = right / np.maximum(told, 1), right / np.maximum(asked, 1)
    f1 = 2 * right / np.maximum(asked + told, 1)
    return np.array([precision[there].mean(), recall[there].mean(), f1[there].mean()])


def extract(labels: Sequence[str], answers: Sequence[str], seed: int) -> tuple[list[Score], dict[str, Any]]:
    """Return how answers agree with texts: exact matches, and precision, recall and F1 of their words, as means.

    These are SQuAD's measures (Rajpurkar et al., 2016, arXiv:1606.05250), but for its English articles: case and
    punctuation do not count, and a Chinese character is a word.
    """
    pairs = [(_words(label), _words(answer)) for label, answer in zip(labels, answers, strict=True)]
    exact = [label == answer for label, answer in pairs]
    figures = np.array([_overlap(Counter(label), Counter(answer)) for label, answer in pairs])
    edges = bootstrap(lambda chosen: figures[chosen].mean(0), len(figures), seed)
    scores = [Score("exact_match", sum(exact) / len(exact), None, True, interval=wilson(sum(exact), len(exact)))]
    for place, name in enumerate(("word_precision", "word_recall", "word_f1")):
        interval = (float(edges[0][place]), float(edges[1][place]))
        scores.append(Score(name, float(figures[:, place].mean()), None, True, interval=interval))
    intervals = "95%: exact matches by Wilson's score, the rest by 2,000 bootstrap resamples of the examples"
    return scores, {"intervals": intervals}


_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u9fff\uf900-\ufaff]+")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _overlap(label: Counter[str], answer: Counter[str]) -> tuple[float, float, float]:
    shared = sum((label & answer).values())
    if not shared:
        return (0.0, 0.0, 0.0) if label or answer else (1.0, 1.0, 1.0)
    precision, recall = shared / sum(answer.values()), shared / sum(label.values())
    return precision, recall, 2 * precision * recall / (precision + recall)

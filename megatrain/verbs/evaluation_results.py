"""What the kinds of `megatrain evaluate` share: the chat template, and where results go: tables, files, MLflow."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.config import EvaluateConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.errors import ConfigError, cannot_write
from megatrain.evaluation.results import TaskResult
from megatrain.interop.load_model import Loaded
from megatrain.report.scores_page import scores_page
from megatrain.resilience.atomic_file import write_atomically
from megatrain.resilience.terminal import say
from megatrain.tracking.evaluation_records import records_folder, run_folder_of, write_record
from megatrain.tracking.metrics import to_json
from megatrain.tracking.mlflow_scores import send_scores
from megatrain.verbs.printer import Printer

KEPT_SETTINGS = ("limit", "seed", "system", "batch_size", "num_fewshot", "examples", "answer")


@dataclass(frozen=True)
class ModelResult:
    """What a model got: where it is from, whether its chat template laid out the prompts, and a result a task."""

    path: str
    checkpoint: Path
    step: int | None
    uses_template: bool
    tasks: list[TaskResult]
    seconds: float

    def label(self) -> str:
        """Return the model's name in a table."""
        return self.path if self.step is None else f"{self.path} (step {self.step})"

    def to_dict(self, with_samples: bool) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "chat_template": self.uses_template,
            "tasks": {task.name: task.to_dict(with_samples) for task in self.tasks},
            "seconds": self.seconds,
        }


def choose_template(path: str, loaded: Loaded, config: EvaluateConfig) -> ChatTemplate | None:
    """Return the chat template that lays out a model's prompts; None for a model that continues text.

    Raises ConfigError if `chat_template=always` or a system message asks for a template that the model lacks.
    """
    has_template = loaded.need_tokenizer().chat_template() is not None
    if config.chat_template == "never" or not has_template:
        if config.chat_template == "always":
            raise ConfigError(
                f"chat_template=always: the tokenizer of {path} has no chat template; leave the key out to evaluate a "
                "model that was not tuned on conversations"
            )
        if config.system is not None:
            reason = "chat_template=never leaves it out" if has_template else f"the tokenizer of {path} has none"
            raise ConfigError(f"system: a system message needs a chat template, and {reason}; leave system out")
        return None
    return ChatTemplate(loaded.need_tokenizer())


def ends_of(loaded: Loaded, template: ChatTemplate | None) -> frozenset[int]:
    """Return the ids that end an answer."""
    return loaded.end_tokens() | frozenset(template.ends() if template else ())


def keep(result: ModelResult, kind: str, config: EvaluateConfig) -> None:
    """Write a checkpoint's result to its run's folder, or its own, and send its scores to the run's MLflow run."""
    if result.step is None:
        return
    place = records_folder(result.checkpoint)
    if not os.access(place, os.W_OK):
        say(f"{place} cannot be written to, so the scores are not kept there; out=scores.json keeps them")
        return
    settings = {name: getattr(config, name) for name in KEPT_SETTINGS}
    scores = {}
    for task in result.tasks:
        record = {**task.to_dict(with_samples=True), "chat_template": result.uses_template, "settings": settings}
        write_record(place, result.step, kind, task.name, record)
        for one in task.scores:
            scores[f"{kind}/{task.name}/{one.key}"] = one.value
            if one.stderr is not None:
                scores[f"{kind}/{task.name}/{one.key}_stderr"] = one.stderr
    if (run_dir := run_folder_of(result.checkpoint)) is not None:
        send_scores(run_dir, result.step, scores)


def write_out(out: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write results to a JSON file: of one model its object, of several `{"models": [...]}`.

    Raises ConfigError or EnvironmentFault if it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, to_json(results[0] if len(results) == 1 else {"models": list(results)}) + "\n")
    except OSError as error:
        raise cannot_write(out, error, "out") from error


def show(results: Sequence[ModelResult], config: EvaluateConfig, note: str) -> None:
    """Print the table of all models, and write `out`; standard output gets JSON where it is no terminal."""
    if config.out is not None:
        write_out(Path(config.out), [result.to_dict(with_samples=True) for result in results])
    if config.page is not None:
        shown_by = {result.label(): [task.to_dict(with_samples=False) for task in result.tasks] for result in results}
        scores_page(shown_by, note, Path(config.page))
    to_terminal = sys.stdout.isatty()
    printer = Printer(stderr=not to_terminal)
    for result in results:
        how = ", prompts by its chat template" if result.uses_template else ""
        printer.line(f"{result.label()}: {result.seconds:.1f} s{how}")
    printer.table("scores", *table(results))
    printer.line(note + (f"; limit={config.limit}: only the first documents were read" if config.limit else ""))
    for result in results:
        for task in result.tasks:
            title = f"{task.name}, {result.label()}" if len(results) > 1 else task.name
            _show_labels(printer, task, title)
            for line in task.detail.get("notes", ()):
                printer.line(f"{title}: {line}")
    if not to_terminal:
        shown = [json.loads(to_json(result.to_dict(with_samples=False))) for result in results]
        print(json.dumps(shown[0] if len(shown) == 1 else {"models": shown}), flush=True)


def table(results: Sequence[ModelResult]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table: a row a metric, a column a model."""
    values = ["value"] if len(results) == 1 else [result.label() for result in results]
    has_shots = any(task.num_fewshot is not None for task in results[0].tasks)
    rows = []
    for number, task in enumerate(results[0].tasks):
        for place, one in enumerate(task.scores):
            cells = [result.tasks[number].scores[place].shown() for result in results]
            arrow = {True: " ↑", False: " ↓", None: ""}[one.higher_is_better]
            shots = ["" if task.num_fewshot is None else str(task.num_fewshot)] if has_shots else []
            rows.append([task.name, f"{one.key}{arrow}", *cells, f"{task.documents:,}", *shots])
    return ["task", "metric", *values, "documents", *(["examples before"] if has_shots else [])], rows


def _show_labels(printer: Printer, task: TaskResult, title: str) -> None:
    """Print the figures of each label and the confusion matrix of a classification."""
    by_label, classes = task.detail.get("by_label"), task.detail.get("classes")
    if not by_label or not classes:
        return
    columns = ["label", "precision", "recall", "f1", "examples"]
    rows = [
        [name, *(f"{found[key]:.4f}" for key in columns[1:4]), f"{found['examples']:,}"]
        for name, found in by_label.items()
    ]
    printer.table(f"{title} by label", columns, rows)
    counts = [
        [name, *map(str, row)] for name, row in zip(classes, task.detail["confusion"], strict=True) if name in by_label
    ]
    printer.table(f"{title}: right label (rows) and answer (columns)", ["", *classes], counts)

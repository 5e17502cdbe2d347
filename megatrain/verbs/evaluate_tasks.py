"""`megatrain evaluate tasks=[...]`: scores of one or several models on tasks of lm-evaluation-harness, side by side."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.config import EvaluateConfig
from megatrain.data.chat.template import ChatTemplate
from megatrain.distributed.devices import device_by_name
from megatrain.errors import ConfigError, cannot_write
from megatrain.evaluation.harness import Score, Settings, TaskResult, Tasks, find_tasks, run_tasks
from megatrain.evaluation.progress import Progress
from megatrain.evaluation.records import run_folder_of, write_record
from megatrain.interop.load_model import Loaded, load
from megatrain.resilience.atomic_file import write_atomically
from megatrain.tracking.metrics import to_json
from megatrain.tracking.mlflow_scores import send_scores
from megatrain.verbs.printer import Printer


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


def evaluate_tasks(config: EvaluateConfig) -> None:
    """Score each model on the tasks, and print a table; where standard output is no terminal, it gets JSON instead.

    Results of a run go to its folder (`evaluations/`) and to its MLflow run, if it has one; all of them go to `out`.

    Raises:
        ConfigError: a task or its settings do not exist or do not fit a model, or a model has no tokenizer.
        DataError: the data of a task cannot be read.
        CheckpointError: there is no intact model.
        EnvironmentFault: lm-eval or the data of a task are missing.
    """
    tasks = find_tasks(config.tasks, Path(config.tasks_dir) if config.tasks_dir is not None else None)
    results = []
    for path in [config.path, *config.paths]:
        loaded = load(Path(path), config.step)
        result = score(path, loaded, tasks, config)
        keep(result, config)
        results.append(result)
    if config.out is not None:
        write_out(Path(config.out), [result.to_dict(with_samples=True) for result in results])
    show(results, config)


def score(path: str, loaded: Loaded, tasks: Tasks, config: EvaluateConfig) -> ModelResult:
    """Score one model on the tasks."""
    from megatrain.evaluation.harness_model import HarnessModel

    started = time.perf_counter()
    tokenizer = loaded.need_tokenizer()
    template = choose_template(path, loaded, config)
    ends = loaded.end_tokens() | frozenset(template.ends() if template else ())
    model = HarnessModel(
        loaded.build(device_by_name(config.device)),
        tokenizer,
        ends=ends,
        batch_size=config.batch_size,
        seed=config.seed,
        template=template,
        progress=Progress(f"evaluating {path}" if config.paths else "evaluating"),
    )
    settings = Settings(config.num_fewshot, config.limit, config.seed, config.system)
    found = run_tasks(model, tasks, settings)
    step = loaded.manifest.step if loaded.manifest else None
    return ModelResult(path, loaded.folder, step, template is not None, found, time.perf_counter() - started)


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


def keep(result: ModelResult, config: EvaluateConfig) -> None:
    """Write a result to the folder of its run, and send its scores to the run's MLflow run, if it has them."""
    run_dir = run_folder_of(result.checkpoint)
    if run_dir is None or result.step is None:
        return
    settings = {"limit": config.limit, "seed": config.seed, "system": config.system, "batch_size": config.batch_size}
    for task in result.tasks:
        record = {**task.to_dict(with_samples=True), "chat_template": result.uses_template, "settings": settings}
        write_record(run_dir, result.step, "task", task.name, record)
    scores = {f"tasks/{task.name}/{key_of(one)}": one.value for task in result.tasks for one in task.scores}
    scores |= {
        f"tasks/{task.name}/{key_of(one)}_stderr": one.stderr
        for task in result.tasks
        for one in task.scores
        if one.stderr is not None
    }
    send_scores(run_dir, result.step, scores)


def key_of(one: Score) -> str:
    """Return a score's name, with that of the answers' filter if there is one."""
    return f"{one.metric}.{one.variant}" if one.variant else one.metric


def write_out(out: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write results to a JSON file: of one model its object, of several `{"models": [...]}`.

    Raises ConfigError or EnvironmentFault if it cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, to_json(results[0] if len(results) == 1 else {"models": list(results)}) + "\n")
    except OSError as error:
        raise cannot_write(out, error, "out") from error


def show(results: Sequence[ModelResult], config: EvaluateConfig) -> None:
    """Print the table of all models; as JSON on standard output where that is no terminal."""
    to_terminal = sys.stdout.isatty()
    printer = Printer(stderr=not to_terminal)
    for result in results:
        how = ", prompts by its chat template" if result.uses_template else ""
        printer.line(f"{result.label()}: {result.seconds:.1f} s{how}")
    printer.table("tasks", *table(results))
    printer.line("after ±: one standard error, over a task's documents" + told_limit(config))
    if not to_terminal:
        shown = [result.to_dict(with_samples=False) for result in results]
        print(json.dumps(json.loads(to_json(shown[0] if len(shown) == 1 else {"models": shown}))), flush=True)


def told_limit(config: EvaluateConfig) -> str:
    """Return the words of a table about `limit`."""
    return f"; limit={config.limit}: only the first documents of a task were read" if config.limit else ""


def table(results: Sequence[ModelResult]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table: a row a metric, a column a model."""
    values = ["value"] if len(results) == 1 else [result.label() for result in results]
    rows = []
    for number, task in enumerate(results[0].tasks):
        for place, one in enumerate(task.scores):
            cells = [cell(result.tasks[number].scores[place]) for result in results]
            arrow = {True: " ↑", False: " ↓", None: ""}[one.higher_is_better]
            shots = "" if task.num_fewshot is None else str(task.num_fewshot)
            rows.append([task.name, f"{key_of(one)}{arrow}", *cells, f"{task.documents:,}", shots])
    return ["task", "metric", *values, "documents", "examples"], rows


def cell(one: Score) -> str:
    """Return a score with its standard error: `0.9167 ± 0.0360`."""
    number = f"{one.value:.4f}" if abs(one.value) < 1000 else f"{one.value:.5g}"
    return number if one.stderr is None else f"{number} ± {one.stderr:.4f}"

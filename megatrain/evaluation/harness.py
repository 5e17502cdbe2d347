"""Score a model on the tasks of lm-evaluation-harness: find them, run them, and reduce what it returns.

The library is imported when tasks are loaded; megatrain[evaluate] installs it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatrain.config.suggest import did_you_mean
from megatrain.data.hub import one_line_a_wait
from megatrain.errors import ConfigError, DataError, EnvironmentFault, how_to_install
from megatrain.evaluation.results import Score, TaskResult

BOOTSTRAPS = 1000
"""Resamples of the documents, for the standard error of a metric that is no mean over documents."""


class Tasks:
    """Tasks that have been found, with their data."""

    def __init__(self, loaded: dict[str, Any]) -> None:
        self.loaded = loaded

    @property
    def names(self) -> list[str]:
        """The names of the single tasks, without groups."""
        return list(self.loaded["tasks"])

    def texts(self, limit: int | None = None) -> dict[str, list[str]]:
        """Return the texts of each task's documents, the first `limit` of them: what is asked, and the answers."""
        return {
            name: [document_text(task, document) for document in islice(task.eval_docs, limit)]
            for name, task in self.loaded["tasks"].items()
        }


def document_text(task: Any, document: dict[str, Any]) -> str:
    """Return a document of a task as one text: what is asked, and the right answer where that is a text."""
    asked = task.doc_to_text(document)
    parts = [asked] if isinstance(asked, str) else []
    if task.config.doc_to_choice is not None:
        parts += task.doc_to_choice(document)
    target = task.doc_to_target(document)
    parts += [target] if isinstance(target, str) else []
    return "\n".join(dict.fromkeys(part for part in parts if part))


def find_tasks(names: Sequence[str], folder: Path | None) -> Tasks:
    """Load tasks by name or pattern, from a folder of YAML files or the harness; without names, all of the folder.

    Raises:
        ConfigError: there is no such task, its file is not valid, or it would run code that the model writes.
        DataError: its data cannot be read.
        EnvironmentFault: lm-eval is missing, or the data are not on this disk and the hub cannot be reached.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EnvironmentFault(f"tasks need lm-eval ({error}): {how_to_install('evaluate')}") from error
    with _quiet():
        manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=False)
        if folder and not manager.all_tasks:
            raise ConfigError(
                f"tasks_dir={folder}: holds no task of lm-evaluation-harness (a .yaml file with task: NAME)"
            )
        wanted = list(names) or manager.all_subtasks
        missing = [name for name in wanted if not manager.match_tasks([name])]
        if missing and not any(did_you_mean("", name, manager.all_tasks) for name in missing):
            manager = TaskManager(include_path=str(folder) if folder else None)  # reads 15,000 files: 10 s
        matched: list[str] = []
        for name in wanted:
            found = manager.match_tasks([name])
            if not found:
                near = did_you_mean("", name, manager.all_tasks)
                raise ConfigError(
                    f"tasks: no task {name}{near or ';'} give a name or pattern of lm-evaluation-harness "
                    "(lm-eval ls tasks lists them), or your own tasks with tasks_dir=<folder of YAML files>"
                )
            matched += [one for one in found if one not in matched]
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in matched:
            for kind, entries in _load(manager, name).items():
                loaded[kind].update(entries)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"tasks: {name} runs programs that the model writes, which megatrain does not do")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"tasks: {name} has images or sounds, which the model does not take")
    return Tasks(loaded)


def _load(manager: Any, name: str) -> dict[str, Any]:
    """Load one task or group with its data."""
    try:
        with one_line_a_wait(f"tasks={name}"):
            loaded: dict[str, Any] = manager.load([name])
        return loaded
    except Exception as error:  # the library, and the Python code of tasks, raise anything
        raise _told(manager, name, error) from error


_NETWORK = ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectTimeout", "ConnectError")
"""Names of errors that mean the hub cannot be reached."""


def _told(manager: Any, name: str, error: Exception) -> Exception:
    """Return the error of a task that cannot be loaded, in our words."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)  # type: ignore[arg-type]
    kinds = {kind.__name__ for one in causes for kind in type(one).__mro__}
    text = f"{type(error).__name__}: {str(error).strip()[:300]}"
    if kinds & set(_NETWORK):
        return EnvironmentFault(
            f"tasks: the data of {name} are not on this disk, and the Hugging Face hub cannot be reached ({text}). Get "
            "them on a machine with a network: run the same command there once and copy its cache (HF_HOME); or save "
            "the data as JSON lines, and name them in a copy of the task in tasks_dir: dataset_path: json, "
            "dataset_kwargs: {data_files: {test: <file>}}"
        )
    if isinstance(error, FileNotFoundError) or kinds & {"DatasetNotFoundError", "DataFilesNotFoundError"}:
        return DataError(f"tasks: the data of {name} cannot be found ({text}); look at its dataset_path and data_files")
    if isinstance(error, ImportError):
        return EnvironmentFault(f"tasks: {name} needs another library ({text}); install it with pip")
    return ConfigError(f"tasks: {name} cannot be loaded ({text}); mend its YAML file, or leave it out")


@dataclass(frozen=True)
class Settings:
    """How tasks run: examples before each question, documents of each task (None: all), and the seed of examples."""

    num_fewshot: int | None
    limit: int | None
    seed: int
    system: str | None = None


def run_tasks(model: Any, tasks: Tasks, settings: Settings) -> list[TaskResult]:
    """Score a `HarnessModel` on tasks; groups come before their tasks.

    Raises:
        ConfigError: a task asks for what the model cannot do.
    """
    from lm_eval.evaluator import evaluate

    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)
    for task in tasks.loaded["tasks"].values():
        fixed = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and fixed != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif fixed is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=settings.seed)
        task._instances = None  # those of an earlier model
    uses_template = bool(model.chat_template())
    with _quiet():
        found = evaluate(
            model,
            tasks.loaded,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            system_instruction=settings.system,
            apply_chat_template=uses_template,
            fewshot_as_multiturn=uses_template,
        )
    names = [*found.get("groups", {}), *tasks.loaded["tasks"]]
    return [_reduced(name, found, tasks) for name in names]


def _reduced(name: str, found: dict[str, Any], tasks: Tasks) -> TaskResult:
    """Return a task's result out of what the harness returned."""
    table = found["groups" if name in found.get("groups", {}) else "results"][name]
    better = found["higher_is_better"].get(name, {})
    scores = []
    for key, value in table.items():
        metric, comma, variant = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = table.get(f"{metric}_stderr,{variant}")
        scores.append(
            Score(
                metric,
                float(value),
                float(error) if isinstance(error, (int, float)) and math.isfinite(error) else None,
                better.get(metric),
                "" if variant == "none" else variant,
            )
        )
    version = found["versions"].get(name)
    version = None if version in (None, "Yaml") else str(version)  # what the harness puts where a file has none
    samples = [_plain(sample) for sample in found.get("samples", {}).get(name, ())]
    documents = table.get("sample_len") or len({sample["doc_id"] for sample in samples})
    return TaskResult(name, version, found["n-shot"].get(name), int(documents), scores, samples)


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: what the harness records has NumPy numbers, tuples and objects."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' bars and notes away: what they warn of are settings that are chosen here."""
    import datasets
    import lm_eval.api.task as task_module

    logs = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [log.level for log in logs]
    pooled, bar = os.environ.get("DISABLE_MULTIPROC"), task_module.tqdm
    os.environ["DISABLE_MULTIPROC"] = "1"  # its pool would fork a process that has computed with torch
    task_module.tqdm = lambda found, *_, **__: found
    for log in logs:
        log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # standard output is for the results
            yield
    finally:
        datasets.enable_progress_bars()
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        task_module.tqdm = bar
        if pooled is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = pooled

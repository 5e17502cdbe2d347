"""`megatrain evaluate tasks=[...]`: scores of one or several models on tasks of lm-evaluation-harness, side by side."""

from __future__ import annotations

import time
from pathlib import Path

from megatrain.config import EvaluateConfig
from megatrain.distributed.devices import device_by_name
from megatrain.evaluation.harness import Settings, Tasks, find_tasks, run_tasks
from megatrain.evaluation.progress import Progress
from megatrain.interop.load_model import Loaded, load
from megatrain.verbs.contamination import with_contamination
from megatrain.verbs.evaluation_results import ModelResult, choose_template, ends_of, keep, show

NOTE = "after ±: one standard error, over a task's documents"


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
        result = score(path, load(Path(path), config.step), tasks, config)
        keep(result, "tasks", config)
        results.append(result)
    hint = "" if config.contamination else "; contamination=true counts the texts that the model was trained on"
    show(results, config, NOTE + hint)


def score(path: str, loaded: Loaded, tasks: Tasks, config: EvaluateConfig) -> ModelResult:
    """Score one model on the tasks."""
    from megatrain.evaluation.harness_model import HarnessModel

    started = time.perf_counter()
    tokenizer = loaded.need_tokenizer()
    template = choose_template(path, loaded, config)
    model = HarnessModel(
        loaded.build(device_by_name(config.device)),
        tokenizer,
        ends=ends_of(loaded, template),
        batch_size=config.batch_size,
        seed=config.seed,
        template=template,
        progress=Progress(f"evaluating {path}" if config.paths else "evaluating"),
    )
    found = run_tasks(model, tasks, Settings(config.num_fewshot, config.limit, config.seed, config.system))
    if config.contamination:
        found = with_contamination(found, loaded, tasks.texts(config.limit))
    step = loaded.manifest.step if loaded.manifest else None
    return ModelResult(path, loaded.folder, step, template is not None, found, time.perf_counter() - started)

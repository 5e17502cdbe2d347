"""`megatrain evaluate <model> <others ...> prompts=FILE judge=REWARD`: how often the first model answers better.

The judge is a reward function or a reward model. One model alone gets its mean score.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch

from megatrain.config import EvaluateConfig
from megatrain.distributed.devices import device_by_name
from megatrain.errors import CheckpointError, ConfigError
from megatrain.evaluation.progress import Progress
from megatrain.evaluation.prompts import Answer, Prompts
from megatrain.evaluation.results import TaskResult
from megatrain.evaluation.win_rate import compare, mean_score, read_prompts
from megatrain.interop.load_model import load
from megatrain.reinforcement.judge import Judge
from megatrain.reinforcement.reward_model import RewardModel, load_scorer
from megatrain.reinforcement.rewards import Replies, is_function
from megatrain.verbs.evaluate_examples import write_answers
from megatrain.verbs.evaluation_results import ModelResult, choose_template, ends_of, keep, show

NOTE = "in brackets: the 95% interval, by 2,000 bootstrap resamples of the prompts; a tie is half a win"

LIMIT_S = 600.0
"""Longest time that a judging function may take for one model's replies."""


def evaluate_win_rate(config: EvaluateConfig) -> None:
    """Let each model answer the prompts, score the replies with the judge, and compare `path` with each of `paths`.

    Without `paths` the scores of `path` stand alone.

    Raises:
        ConfigError: a prompt is too long for a model, or a model has no tokenizer.
        DataError: the prompts cannot be read.
        RewardError: the judge cannot be loaded, fails, or returns something else than a finite number a reply.
        CheckpointError: there is no intact model, or no intact reward model.
    """
    assert config.prompts is not None and config.judge is not None
    prompts = read_prompts(Path(config.prompts), config.limit)
    fields = {name: [prompt[name] for prompt in prompts] for name in prompts[0] if name != "prompt"}
    asked = [prompt["prompt"] for prompt in prompts]
    answers: list[tuple[dict[str, Any], list[str], list[float]]] = []
    with contextlib.closing(_judge(config, list(fields))) as judge:
        for path in [config.path, *config.paths]:
            started = time.perf_counter()
            about, written = _replies(path, asked, config)
            replies = [answer.text().strip() for answer in written]
            stopped = [answer.ended for answer in written]
            with _as_judge(config.judge):
                found = [float(one) for one in judge(Replies(asked, replies, stopped, fields))[:, 0]]
            answers.append((about | {"seconds": time.perf_counter() - started}, replies, found))
    first, ours, scores = answers[0]
    tasks = []
    if not config.paths:
        samples = [{"prompt": asked[at], "reply": ours[at], "score": scores[at]} for at in range(len(asked))]
        name = f"scores by {config.judge}"
        tasks.append(TaskResult(name, None, None, len(asked), [mean_score(scores, config.seed)], samples))
    for about, theirs, other in answers[1:]:
        figures, detail = compare(scores, other, config.seed)
        samples = [
            {
                "prompt": asked[at],
                "reply": ours[at],
                "score": scores[at],
                "other_reply": theirs[at],
                "other_score": other[at],
            }
            for at in range(len(asked))
        ]
        notes = [
            f"{detail['wins']} wins, {detail['ties']} ties, {detail['losses']} losses; mean score of {config.judge} "
            f"{detail['mean_scores'][0]:.4f} against {detail['mean_scores'][1]:.4f}"
        ]
        name = f"against {about['path']}"
        tasks.append(TaskResult(name, None, None, len(asked), figures, samples, detail | {"notes": notes}))
    result = ModelResult(**first, tasks=tasks)
    keep(result, "win_rates", config)
    show([result], config, NOTE)


def _replies(path: str, asked: list[str], config: EvaluateConfig) -> tuple[dict[str, Any], list[Answer]]:
    """Return where a model is from, and what it answers."""
    loaded = load(Path(path), config.step)
    template = choose_template(path, loaded, config)
    prompts = Prompts(loaded.need_tokenizer(), template)
    replies = write_answers(
        loaded.build(device_by_name(config.device)),
        prompts,
        [prompts.ask(text, config.system) for text in asked],
        ends_of(loaded, template),
        config,
        Progress(f"evaluating {path}"),
        config.temperature,
    )
    step = loaded.manifest.step if loaded.manifest else None
    about = {"path": path, "checkpoint": loaded.folder, "step": step, "uses_template": template is not None}
    return about, replies


def _judge(config: EvaluateConfig, fields: list[str]) -> Judge:
    name = config.judge
    assert name is not None
    with _as_judge(name):
        models = []
        if not is_function(name):
            models.append(RewardModel(name, load_scorer(name), device_by_name(config.device), torch.float32))
        return Judge([name], models, fields, LIMIT_S)


@contextlib.contextmanager
def _as_judge(name: str) -> Any:
    """Let errors of rewards name the key of this verb."""
    try:
        yield
    except (ConfigError, CheckpointError) as error:
        text = str(error).replace(f"method.rewards: {name}", f"judge={name}")
        raise type(error)(text.replace("method.reward_timeout_s=", "the limit in seconds, ")) from error

"""Checks of `megatrain evaluate`: which keys go together, what it reads, what must be installed. Imports no torch."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from megatrain.config import EvaluateConfig
from megatrain.config.plain import plain
from megatrain.config.values import exists
from megatrain.errors import ConfigError, EnvironmentFault, how_to_install
from megatrain.reinforcement.embedded_rewards import EMBEDDED
from megatrain.reinforcement.rewards import is_function
from megatrain.verbs.places import require
from megatrain.verbs.scorer_checks import check_scorer

LOSS, TASKS, EXAMPLES, WIN_RATE = "the loss on text", "tasks", "examples", "the win rate on prompts"
REWARDS_ARE = "it gets prompts and completions and returns a number for each, as a reward of megatrain tune does"
ASKING = (TASKS, EXAMPLES, WIN_RATE)

USED_BY: dict[str, tuple[str, ...]] = {
    "ensemble": (LOSS,),
    "data": (LOSS,),
    "split": (LOSS,),
    "seq_len": (LOSS,),
    "max_batches": (LOSS,),
    "num_fewshot": (TASKS,),
    "answer": (EXAMPLES,),
    "judge": (WIN_RATE,),
    "temperature": (WIN_RATE,),
    "max_new_tokens": (EXAMPLES, WIN_RATE),
    "contamination": (TASKS, EXAMPLES),
    "limit": ASKING,
    "chat_template": ASKING,
    "system": ASKING,
    "seed": ASKING,
    "out": ASKING,
    "page": ASKING,
}
"""The keys that not every kind of evaluation has, and those that have them."""

CHOSEN_BY = {TASKS: ("tasks", "tasks_dir"), EXAMPLES: ("examples",), WIN_RATE: ("prompts",)}
"""The keys that choose a kind of evaluation; without any it is the loss on text."""


def kind_of_evaluation(config: EvaluateConfig) -> str:
    """Return what a config evaluates: `LOSS`, `TASKS`, ..."""
    for kind, keys in CHOSEN_BY.items():
        if any(getattr(config, name) for name in keys):
            return kind
    return LOSS


def check_keys(config: EvaluateConfig) -> None:
    """Refuse keys that have no effect in this kind of evaluation. Raises ConfigError."""
    kind = kind_of_evaluation(config)
    chosen = [name for names in CHOSEN_BY.values() for name in names[:1] if getattr(config, name)]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} are evaluations of their own; give one of them at a time")
    if config.max_new_tokens != EvaluateConfig.max_new_tokens and kind == EXAMPLES and config.answer == "label":
        raise ConfigError("max_new_tokens has no effect with answer=label; add answer=written or answer=text")
    if kind == WIN_RATE:
        if config.judge is None:
            raise ConfigError(
                f"prompts={config.prompts}: give a judge that scores replies: a reward model, or module:function; "
                f"{REWARDS_ARE}"
            )
        if not is_function(config.judge) and not exists(config.judge):
            raise ConfigError(
                f"judge={config.judge} is neither module:function, {', '.join(EMBEDDED)}, nor the path of a reward "
                "model"
            )
    for f in fields(EvaluateConfig):
        value = getattr(config, f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if f.name in USED_BY and kind not in USED_BY[f.name] and value != default:
            needed = [name for other in USED_BY[f.name] for name in CHOSEN_BY.get(other, ())[:1]]
            advice = (
                f"add {' or '.join(f'{name}=...' for name in needed)}, or leave it out" if needed else "leave it out"
            )
            raise ConfigError(f"{f.name}={plain(value)} has no effect on {kind}; {advice}")
    if config.step is not None and config.paths:
        raise ConfigError(
            f"step={config.step} chooses a checkpoint of one run; of several give the checkpoints themselves, such as "
            f"{config.path}/checkpoints/step_{config.step:08d}"
        )


def check_evaluation(config: EvaluateConfig) -> None:
    """Check that what an evaluation reads exists, and that the libraries that it needs are installed.

    Raises:
        ConfigError: a path does not exist, or the judge is no reward model.
        EnvironmentFault: a library is missing.
    """
    for path in config.paths:
        require("paths", Path(path))
    if config.data is not None:
        require("data", Path(config.data))
    if config.tasks_dir is not None:
        require("tasks_dir", Path(config.tasks_dir))
        if not Path(config.tasks_dir).is_dir():
            raise ConfigError(f"tasks_dir={config.tasks_dir} is a file; give the folder with your tasks' YAML files")
    if config.prompts is not None:
        require("prompts", Path(config.prompts))
        if config.judge is not None and not is_function(config.judge):
            check_scorer(f"judge={config.judge}", "judge", Path(config.judge))
    if config.examples is not None:
        require("examples", Path(config.examples))
        if find_spec("sklearn") is None:
            raise EnvironmentFault(f"examples need scikit-learn: {how_to_install('evaluate')}")
    if kind_of_evaluation(config) == TASKS and find_spec("lm_eval") is None:
        raise EnvironmentFault(f"tasks need lm-evaluation-harness: {how_to_install('evaluate')}")

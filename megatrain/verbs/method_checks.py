"""Checks of `method.*` against the other keys, and of the files that it names. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatrain.config import SAMPLING, WITH_VALUES, MethodConfig, TrainConfig
from megatrain.config.arithmetic import either
from megatrain.config.method_config import TARGETS
from megatrain.config.values import as_text
from megatrain.data.prompts import KIND
from megatrain.errors import ConfigError
from megatrain.reinforcement.rewards import check_names, is_function
from megatrain.verbs.places import require
from megatrain.verbs.scorer_checks import check_scorer

FOR_SAMPLING = ("rewards", "reward_weights")
"""Keys of `method` that say nothing to other methods."""

FOR_VALUES = ("gamma", "gae_lambda", "value_weight", "value_clip", "whiten")
"""Keys of `method` that say nothing to methods without a value head."""

HOW_TO_SAMPLE = f"add {' or '.join(f'method={name}' for name in SAMPLING)}"


def check_method(config: TrainConfig) -> None:
    """Check that the keys of the method agree with one another and with the loop's. Raises ConfigError."""
    method, loop = config.method, config.train
    _check_labels(method)
    _check_low_rank(config)
    _check_teacher(method)
    _check_values(method)
    if method.name not in SAMPLING:
        if given := next((name for name in FOR_SAMPLING if getattr(method, name)), None):
            raise ConfigError(
                f"method.{given}={getattr(method, given)}: method={method.name} has no rewards; {HOW_TO_SAMPLE}"
            )
        if config.data.kind == KIND:
            raise ConfigError(
                f"data={KIND}: method={method.name} does not sample replies, and prompts have none; {HOW_TO_SAMPLE}"
            )
        return
    check_names(method.rewards, method.reward_weights)
    if method.group_size == 1 and method.name not in WITH_VALUES:
        raise ConfigError(
            f"method.group_size=1: method={method.name} compares the replies to a prompt with one another; give "
            "method.group_size=2 or more, or use method=ppo"
        )
    if loop.global_batch_size % method.group_size:
        fewer = loop.global_batch_size // method.group_size * method.group_size
        raise ConfigError(
            f"train.global_batch_size={loop.global_batch_size} counts replies, {method.group_size} to each prompt "
            f"(method.group_size), and is not a multiple of that; give train.global_batch_size="
            f"{either([size for size in (fewer, fewer + method.group_size) if size])}"
        )
    if method.max_new_tokens >= loop.seq_len:
        raise ConfigError(
            f"method.max_new_tokens={method.max_new_tokens} leaves no room for a prompt in train.seq_len="
            f"{loop.seq_len}; give fewer new tokens or a longer train.seq_len"
        )
    if method.kl and config.checkpoint.init_from is None:
        raise ConfigError(
            f"method.kl={method.kl:g} keeps the model close to the one that the run begins from; name that as "
            "checkpoint.init_from=<run or checkpoint>, or use megatrain tune"
        )
    refused: dict[str, tuple[Any, Any]] = {
        "train.batch_ramp_start": (loop.batch_ramp_start, None),
        "train.skip_ranges": (loop.skip_ranges, []),
        "train.mask_documents": (loop.mask_documents, False),
        "data.packing": (config.data.packing, "concatenate"),
        "resilience.spike_zscore": (config.resilience.spike_zscore, 0.0),
    }
    for key, (value, needed) in refused.items():
        if value != needed:
            raise ConfigError(
                f"{key}={as_text(value)}: method={method.name} trains on replies that it samples, one a row; give "
                f"{key}={as_text(needed)}, as method={method.name} does by itself"
            )


def _check_labels(method: MethodConfig) -> None:
    """Check that the method has labels to smooth, if they are to be smoothed."""
    share = method.label_smoothing
    if share and method.name not in ("pretrain", "sft", "dpo"):
        raise ConfigError(f"method.label_smoothing={share:g}: method={method.name} has no labels; leave it out")
    if share >= 0.5 and method.name == "dpo":
        raise ConfigError(
            f"method.label_smoothing={share:g}: with half of the pairs labelled the wrong way round nothing is left to "
            "learn; give less than 0.5"
        )


def _check_teacher(method: MethodConfig) -> None:
    """Check that the method has a teacher if it learns from one."""
    if method.name == "distill" and method.teacher is None:
        raise ConfigError(
            "method=distill learns from another model; name it: method.teacher=<run, checkpoint or Hugging Face folder>"
        )
    if method.name != "distill" and method.teacher is not None:
        raise ConfigError(f"method.teacher={method.teacher}: method={method.name} has no teacher; add method=distill")


def _check_values(method: MethodConfig) -> None:
    """Check that keys of a value head are given to a method that has one, and those of a group to one that has none."""
    idle: tuple[str, ...] = FOR_VALUES
    why, other = "learns no values", "ppo"
    if method.name in WITH_VALUES:
        idle, why, other = ("advantages",), "takes advantages from values, not from groups", "grpo"
    untouched = MethodConfig()
    for name in idle:
        if (given := getattr(method, name)) != getattr(untouched, name):
            raise ConfigError(
                f"method.{name}={as_text(given)}: method={method.name} {why}; leave it out, or use method={other}"
            )


def _check_low_rank(config: TrainConfig) -> None:
    """Check that low-rank layers have a place in the model."""
    lora = config.method.lora
    if lora.rank and config.optim.keep_zeros:
        raise ConfigError(
            f"optim.keep_zeros=true: low-rank layers (method.lora.rank={lora.rank}) fill the zeros where they are "
            "merged into the weights; leave one of them out"
        )
    if lora.rank and not set(lora.targets) - (set() if config.model.gated else {"gate"}):
        raise ConfigError(
            f"method.lora.targets={as_text(lora.targets)} names no projection of the model; give some of "
            f"{', '.join(TARGETS)}, or leave it out for all"
        )


def check_method_files(config: TrainConfig) -> None:
    """Check that the files of a user's rewards, and the teacher, exist, and that reward models are some.

    Raises ConfigError, or CheckpointError for a run without a checkpoint that can be read.
    """
    if config.method.teacher is not None:
        require("method.teacher", Path(config.method.teacher))
    for name in config.method.rewards:
        place = name.rpartition(":")[0]
        if not is_function(name):
            check_scorer(f"method.rewards={name}", "method.rewards", Path(name).expanduser())
        elif place.endswith(".py"):
            require("method.rewards", Path(place).expanduser())

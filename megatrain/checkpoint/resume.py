"""What a resumed run may change freely, what only on purpose (`checkpoint.override`), and the check of a resume."""

from __future__ import annotations

import bisect
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from megatrain.checkpoint.continued_mixture import MIXTURE_KEYS, harmless_keys
from megatrain.checkpoint.manifest import Manifest, Override, Progress
from megatrain.config import ModelConfig, TrainConfig
from megatrain.config.flatten import flatten
from megatrain.config.plain import plain
from megatrain.data.order import merge_ranges
from megatrain.errors import CheckpointError, DataError

MAY_CHANGE = (
    "run.*",  # a run may be moved
    "launch.*",
    "parallel.*",
    "engine.*",
    "precision.*",  # master weights are fp32 in every choice
    "optim.moments",  # converted to the other format
    "compile",
    "kernels",
    "deterministic",
    "profile",
    "train.steps",  # a run may be extended or shortened; the schedule is a function of step and steps
    "train.micro_batch_size",
    "train.recompute",
    "train.eval_every",
    "train.eval_steps",
    "train.tasks*",
    "train.early_stop_*",
    "model.name",  # a label
    "method.teacher",  # a path; checkpoints know its weights
    "data.name",
    "data.dir",
    "data.workers",
    "data.overwrite",
    "data.verify",
    "checkpoint.*",
    "resilience.*",
    "tracking.*",
    # how the dataset was prepared; the dataset's fingerprint is compared instead
    "data.kind",
    "data.paths",
    "data.text_column",
    "data.hf_*",
    "data.heldout_fraction",
    "data.fold*",
    "data.max_*",
    "data.oversized",
    "data.undecodable",
    "data.on_bad_record",
    "data.bos",
    "data.join_comments",
    "data.fim_*",
    "data.write_text",
    "data.deduplicate",
    "tokenizer.*",
)
"""Keys (`*` matches any ending) that a resume may change. The layout may change, because it does not affect the result.
Keys that define the model, the data order, the update or the schedule may not change."""

OVERRIDES = (
    "optim.lr",
    "optim.min_lr_ratio",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.decay_fraction",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.grad_clip",
    "train.global_batch_size",
    "train.batch_ramp_start",
    "train.batch_ramp_increment",
    "train.batch_ramp_steps",
    "train.skip_ranges",
    "train.mask_documents",
    "train.reset_positions",
    "model.dropout",
    "method.label_smoothing",
    *MIXTURE_KEYS,
)
"""Keys that a resume changes only if `checkpoint.override` names them. Weights, moments and position are kept."""

UNTOLD = ("checkpoint.override", "checkpoint.resume", "checkpoint.init_from")
"""Keys that say how to start: their change is not worth a line on the terminal."""

Ranges = Iterable[Sequence[int]]

_MODEL_KEYS = {f.name for f in fields(ModelConfig)}

CORRECTION = 0.01
"""Largest relative change of Adam's bias correction that new betas may cause at the step where they begin."""


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ between two resolved configs, as `{key: (old, new)}`.

    Two spellings of one model are equal: a size of null, and the number that it stands for.
    """
    before, after = flatten(old), flatten(new)
    sizes_before, sizes_after = model_sizes(old), model_sizes(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and (key not in sizes_before or key not in sizes_after or sizes_before[key] != sizes_after[key])
    }


def model_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a config's model that may be null, with what null stands for."""
    if "model" not in config:
        return {}
    model = ModelConfig(**{key: value for key, value in config["model"].items() if key in _MODEL_KEYS})
    return {
        "model.num_kv_heads": model.kv_heads,
        "model.head_size": model.head_dim,
        "model.ffn_size": model.ffn_dim,
        "model.attention_bias": model.attention_bias or ("all" if model.bias else "none"),
    }


def may_change(key: str) -> bool:
    """Whether a resume may change a key without `checkpoint.override`."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def check_resume(
    saved: Manifest,
    config: dict[str, Any],
    dataset_fingerprint: str | None,
    origin: str,
    weights_fit: Callable[[], bool] = lambda: True,
) -> dict[str, tuple[Any, Any]]:
    """Refuse to continue `origin` with another model, data order, optimizer or dataset, except where overridden.

    Return the permitted changes as `{key: (old, new)}`. A mixture has no `dataset_fingerprint`: `continue_mixture`
    compares its datasets. A refusal offers a new run from the weights of `origin` if `weights_fit` says that it can be.

    Raises:
        CheckpointError: a key changed that may not (the message gives both values), an override cannot be honoured, or
            `origin` has only weights.
        DataError: the dataset is not the one that the run started with.
    """
    identity = saved.identity
    if identity.dataset_fingerprint is None:
        raise CheckpointError(
            f"{origin} holds only weights, so there is no run to continue; start a new run from them: "
            f"checkpoint.init_from={origin} in place of checkpoint.resume"
        )
    named = config["checkpoint"]["override"]
    changed = changed_keys(_whole(identity.config), config)
    free = harmless_keys(saved, changed)
    forbidden = [key for key in changed if not (may_change(key) or key in free or (key in named and key in OVERRIDES))]
    if forbidden:
        raise CheckpointError(_refusal(origin, {key: changed[key] for key in forbidden}, weights_fit))
    if dataset_fingerprint is not None and identity.dataset_fingerprint != dataset_fingerprint:
        raise DataError(
            f"the dataset changed since {origin} was written: its fingerprint was {identity.dataset_fingerprint} and "
            f"is now {dataset_fingerprint}; restore the dataset, or start a new run with run.name=<new name>"
            f"{f', from these weights with checkpoint.init_from={origin}' if weights_fit() else ''}"
        )
    _check_begun_from(identity.config, config, origin)
    if "optim.betas" in changed:
        _check_betas(saved, *changed["optim.betas"], origin)
    if "train.skip_ranges" in changed:
        skip_ranges(saved.progress, *changed["train.skip_ranges"])
    return changed


def take_over(saved: Manifest, changed: dict[str, tuple[Any, Any]]) -> tuple[Progress, list[Override]]:
    """Return the progress to continue from and all overrides of the run, given the permitted changes."""
    progress = replace(saved.progress)
    if "train.skip_ranges" in changed:
        progress.skip_ranges = skip_ranges(saved.progress, *changed["train.skip_ranges"])
    chosen = [key for key in changed if key in OVERRIDES and key not in harmless_keys(saved, changed)]
    new = [Override(saved.step, key, *changed[key]) for key in chosen]
    return progress, [*saved.identity.overrides, *new]


def skip_ranges(progress: Progress, before: Ranges, now: Ranges) -> list[tuple[int, int]]:
    """Return the ranges that a run skips once its `train.skip_ranges` change from `before` to `now`.

    Ranges that the loss guard added stay. Raises CheckpointError if samples change that the run has passed.
    """
    cursor = progress.cursor
    ahead = [merge_ranges((max(start, cursor), stop) for start, stop in ranges) for ranges in (before, now)]
    passed = [merge_ranges((start, min(stop, cursor)) for start, stop in ranges) for ranges in (before, now)]
    if passed[0] != passed[1]:
        raise CheckpointError(
            f"train.skip_ranges={now}: the run has passed the samples before {cursor}, so the ranges there must stay "
            f"as they were ({[list(given) for given in passed[0]]}); change only those from sample {cursor} on"
        )
    kept = list(progress.skip_ranges)
    for start, stop in ahead[0]:
        kept = [part for low, high in kept for part in ((low, min(high, start)), (max(low, stop), high))]
    return merge_ranges([*kept, *ahead[1]])


def _whole(config: dict[str, Any]) -> dict[str, Any]:
    """Return a saved config with the defaults of keys that the version that wrote it did not have."""
    known = asdict(TrainConfig())
    return known | {
        name: {**known[name], **value} if isinstance(value, dict) and isinstance(known.get(name), dict) else value
        for name, value in config.items()
    }


def _refusal(origin: str, forbidden: dict[str, tuple[Any, Any]], weights_fit: Callable[[], bool]) -> str:
    """Return the message for keys that changed and may not."""
    listed = ", ".join(f"{key} was {plain(before)} and is now {plain(now)}" for key, (before, now) in forbidden.items())
    ways = ["restore them"]
    if chosen := [key for key in forbidden if key in OVERRIDES]:
        rest = "" if len(chosen) == len(forbidden) else " and restore the others"
        ways.append(f"change them on purpose, with moments and position kept: {override_of(chosen)}{rest}")
    ways.append("start anew under another run.name")
    if not any(key.startswith("model.") for key in forbidden) and weights_fit():
        ways[-1] += f", from its weights with checkpoint.init_from={origin}"
    return f"{origin} cannot continue with changed values: {listed}; {', or '.join(ways)}"


def override_of(keys: Iterable[str]) -> str:
    """Return the argument that overrides these keys, quoted for a shell."""
    return f"'checkpoint.override=[{','.join(keys)}]'"


def _check_begun_from(saved: dict[str, Any], config: dict[str, Any], origin: str) -> None:
    """Refuse to continue a run that did not begin from the weights that the command names."""
    began, asked = saved.get("checkpoint", {}).get("init_from"), config["checkpoint"]["init_from"]
    if asked is not None and (began is None or Path(began).resolve() != Path(asked).resolve()):
        raise CheckpointError(
            f"checkpoint.init_from={asked}: the run has checkpoints already ({origin}) and began from "
            f"{began or 'no other weights'}; give another run.name to start from {asked}, or leave "
            f"checkpoint.init_from out to continue the run"
        )


def _check_betas(saved: Manifest, before: list[float], now: list[float], origin: str) -> None:
    """Refuse new betas while Adam's bias correction, which assumes them from the first step, still matters."""
    updates = saved.counters.optimizer.step if saved.counters.optimizer else 0
    first = max(_first_fit(old, new, updates) for old, new in zip(before, now, strict=True))
    if first > updates:
        raise CheckpointError(
            f"optim.betas={now}: after {updates} updates ({origin}) the moments are too young for another decay "
            f"rate, because Adam's bias correction would scale them wrongly; keep {before} until step {first}"
        )


def _first_fit(old: float, new: float, updates: int) -> int:
    """Return the first number of updates, from `updates` on, at which both betas have almost the same correction."""

    def fits(count: int) -> bool:
        return old == new or count == 0 or abs((1 - new**count) / (1 - old**count) - 1) <= CORRECTION

    if fits(updates):
        return updates
    last = updates
    while not fits(last):
        last *= 2
    return bisect.bisect_left(range(last), True, lo=updates, key=fits)

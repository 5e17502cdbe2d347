"""`megatrain merge`: the weights of several models of equal shape as one. `compress/merge.py` has the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.naming import checkpoint_step, list_checkpoints
from megatrain.compress.merge import Formula, ema_weights, merged
from megatrain.compress.result import write_result
from megatrain.config import MergeConfig
from megatrain.errors import CheckpointError, ConfigError
from megatrain.interop.path_kind import checkpoints_folder, kind_of
from megatrain.interop.source import Source, check_alike, open_source
from megatrain.model.count import parameter_shapes
from megatrain.verbs.comparison import Row, print_comparison, with_losses
from megatrain.verbs.path_checks import refuse_existing

READS = {
    "weights": ("average", "ties"),
    "decay": ("ema",),
    "at": ("slerp",),
    "base": ("ties",),
    "density": ("ties",),
    "within": ("ties",),
    "scale": ("ties",),
}
"""The formulas that read a key."""


def merge(config: MergeConfig) -> None:
    """Write the checkpoint `out`, and print the held-out loss of all models before and after.

    Raises:
        ConfigError: `out` exists, the formula does not fit the models, or they differ in shape, family or tokenizer.
        CheckpointError: a model is damaged, or a run has no checkpoint.
        EnvironmentFault: the disk has no room.
    """
    out = Path(config.out)
    refuse_existing(out)
    check_keys(config)
    sources = [open_source(path) for path in models_of(config)]
    base = open_source(Path(config.base)) if config.base is not None else None
    check_formula(config, sources)
    check_alike([*sources, *([base] if base else [])])
    weights = weights_of(config, len(sources))
    by = "average" if config.by == "ema" else config.by
    formula = Formula(by, weights, config.at, base, config.density, config.within, config.scale)
    described = {f"model.{name}": (torch.float32, shape) for name, shape in parameter_shapes(sources[0].config).items()}
    write_result(out, described, merged(sources, formula), sources, made_from(config, sources, weights, base))
    rows = [Row(f"{source.folder}", source.step, source.bytes) for source in sources]
    rows.append(Row(f"{out} ({config.by})", None, open_source(out).bytes))
    print_comparison(out, with_losses(rows, [*(source.folder for source in sources), out], config))


def models_of(config: MergeConfig) -> list[Path]:
    """Return the folders to merge: the paths, or the checkpoints of the only run, oldest first.

    Raises:
        ConfigError: `steps` is given for more than one run, or the run keeps no checkpoint of such a step.
        CheckpointError: the run has no checkpoint.
    """
    paths = [Path(path) for path in config.paths]
    if len(paths) > 1 or not paths or kind_of(paths[0]) != "run":
        if config.steps:
            raise ConfigError(f"steps={config.steps} chooses checkpoints of one run; give that run alone")
        return paths
    folder = checkpoints_folder(paths[0])
    found = {checkpoint_step(path) or 0: path for path in reversed(list_checkpoints(folder))}
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint yet, so there is nothing to merge")
    if missing := [step for step in config.steps if step not in found]:
        raise ConfigError(
            f"steps: {paths[0]} keeps no checkpoint of step {missing[0]} (there are: {', '.join(map(str, found))})"
        )
    return [found[step] for step in config.steps or found]


def check_keys(config: MergeConfig) -> None:
    """Refuse keys that the formula does not read: they would be ignored silently. Raises ConfigError."""
    defaults = MergeConfig(paths=[], out="")
    for name, formulas in READS.items():
        if getattr(config, name) != getattr(defaults, name) and config.by not in formulas:
            raise ConfigError(f"{name}: by={config.by} does not read it; it is for by={' or by='.join(formulas)}")
    if config.by == "ties" and config.base is None:
        raise ConfigError("base=null: by=ties merges changes to a base; give base=<the model that all began from>")


def check_formula(config: MergeConfig, sources: Sequence[Source]) -> None:
    """Check the number of models and weights. Raises ConfigError."""
    if len(sources) < 2:
        raise ConfigError(
            f"paths: {len(sources)} model is too few to merge; give several, or a run that keeps several checkpoints "
            "(checkpoint.keep)"
        )
    if config.by == "slerp" and len(sources) != 2:
        raise ConfigError(f"paths: by=slerp lies between two models, given {len(sources)}")
    if config.weights and len(config.weights) != len(sources):
        raise ConfigError(f"weights: {len(config.weights)} weights for {len(sources)} models; give one for each")
    total = sum(config.weights)
    if any(weight < 0 for weight in config.weights) or (config.weights and (not total or not math.isfinite(total))):
        raise ConfigError(f"weights={config.weights}: give numbers of at least 0, not all 0, with a finite sum")


def weights_of(config: MergeConfig, count: int) -> list[float]:
    """Return the weight of each model. SLERP has its own, which depend on the tensors; at the ends they are these."""
    if config.by == "ema":
        return ema_weights(count, config.decay)
    if config.by == "slerp":
        return [1 - config.at, config.at]
    return list(config.weights) or [1 / count if config.by == "average" else 1.0] * count


def made_from(
    config: MergeConfig, sources: Sequence[Source], weights: Sequence[float], base: Source | None
) -> dict[str, Any]:
    """Return what the manifest says of a merge: the formula, its settings, and the models with their weights."""
    settings = {name: getattr(config, name) for name, formulas in READS.items() if config.by in formulas}
    settings = {name: value for name, value in settings.items() if name not in ("weights", "base")}
    listed = [{**source.reference(), "weight": weight} for source, weight in zip(sources, weights, strict=True)]
    if base is not None:
        listed.append({**base.reference(), "role": "base"})
    return {"verb": "merge", "by": config.by, **settings, "sources": listed}

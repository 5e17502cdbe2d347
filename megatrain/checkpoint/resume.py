"""What a run may change when it continues, and what it may not. The one list of both."""

from __future__ import annotations

import fnmatch
from dataclasses import asdict
from typing import Any

from megatrain.checkpoint.manifest import Identity
from megatrain.config import TrainConfig
from megatrain.config.flatten import flatten
from megatrain.errors import CheckpointError, DataError

MAY_CHANGE = (
    "run.*",  # a run may be moved
    "launch.*",
    "parallel.*",
    "engine.*",
    "precision.*",  # master weights are fp32 in every choice
    "optim.moments",  # rounded to the other format
    "compile",
    "kernels",
    "deterministic",
    "profile",
    "train.steps",  # a run may be made longer or shorter; the schedule is a function of step and steps
    "train.micro_batch_size",
    "train.recompute",
    "train.eval_every",
    "train.eval_steps",
    "train.early_stop_*",
    "data.dir",
    "data.workers",
    "data.overwrite",
    "data.verify",
    "checkpoint.*",
    "resilience.*",
    "tracking.*",
    # how the dataset was made is the dataset's own affair: its fingerprint is compared instead
    "data.kind",
    "data.paths",
    "data.text_column",
    "data.hf_*",
    "data.heldout_fraction",
    "data.max_*",
    "data.oversized",
    "data.undecodable",
    "data.deduplicate",
    "tokenizer.*",
)
"""Keys (with `*` for any ending) that a resume may change. The layout decides nothing about the result, so it is here;
what shapes the model, the data order, the update or the schedule is not."""


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose value differs between two resolved configs: `{key: (old, new)}`."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def may_change(key: str) -> bool:
    """Whether a resume may change a key."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def check_resume(
    saved: Identity, config: dict[str, Any], dataset_fingerprint: str, origin: str
) -> dict[str, tuple[Any, Any]]:
    """Refuse to continue `origin` under another model, order, optimizer or dataset.

    Returns the keys that did change and may, with both values.

    Raises:
        CheckpointError: a key changed that may not, by name, with both values; or weights alone, of no run.
        DataError: the dataset is not the one the run began with.
    """
    if saved.dataset_fingerprint is None:
        raise CheckpointError(
            f"{origin} holds weights alone, so there is no run to continue; start a new one from them: "
            f"checkpoint.init_from={origin}"
        )
    began_with = flatten(asdict(TrainConfig())) | flatten(saved.config)  # a key is younger than some manifests
    changed = changed_keys(began_with, config)
    if forbidden := [key for key in changed if not may_change(key)]:
        listed = ", ".join(f"{key} was {changed[key][0]!r} and is now {changed[key][1]!r}" for key in forbidden)
        raise CheckpointError(
            f"{origin} cannot continue with other values: {listed}; restore them, or start a new run from its weights: "
            f"run.name=<new name> checkpoint.init_from={origin}"
        )
    if saved.dataset_fingerprint != dataset_fingerprint:
        raise DataError(
            f"the dataset changed since {origin} was written: its fingerprint was {saved.dataset_fingerprint} and is "
            f"now {dataset_fingerprint}; restore the dataset, or start a new run: run.name=<new name> "
            f"checkpoint.init_from={origin}"
        )
    return changed

"""The single list of config keys that a resumed run may change, and the check of a resume against it."""

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
    "train.early_stop_*",
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
    "data.max_*",
    "data.oversized",
    "data.undecodable",
    "data.on_bad_record",
    "data.bos",
    "data.deduplicate",
    "tokenizer.*",
)
"""Keys (`*` matches any ending) that a resume may change. The layout may change, because it does not affect the result.
Keys that define the model, the data order, the update or the schedule may not change."""


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ between two resolved configs, as `{key: (old, new)}`."""
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
    """Refuse to continue `origin` with another model, data order, optimizer or dataset.

    Return the permitted changes as `{key: (old, new)}`.

    Raises:
        CheckpointError: a key changed that may not (the message gives both values), or `origin` has only weights.
        DataError: the dataset is not the one that the run started with.
    """
    if saved.dataset_fingerprint is None:
        raise CheckpointError(
            f"{origin} holds only weights, so there is no run to continue; start a new run from them: "
            f"checkpoint.init_from={origin}"
        )
    original = flatten(asdict(TrainConfig())) | flatten(saved.config)  # older manifests lack newer keys
    changed = changed_keys(original, config)
    if forbidden := [key for key in changed if not may_change(key)]:
        listed = ", ".join(f"{key} was {changed[key][0]!r} and is now {changed[key][1]!r}" for key in forbidden)
        raise CheckpointError(
            f"{origin} cannot continue with changed values: {listed}; restore them, or start a new run from its "
            f"weights: run.name=<new name> checkpoint.init_from={origin}"
        )
    if saved.dataset_fingerprint != dataset_fingerprint:
        raise DataError(
            f"the dataset changed since {origin} was written: its fingerprint was {saved.dataset_fingerprint} and is "
            f"now {dataset_fingerprint}; restore the dataset, or start a new run: run.name=<new name> "
            f"checkpoint.init_from={origin}"
        )
    return changed

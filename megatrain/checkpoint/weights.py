"""Which weights of a checkpoint a new run takes (`checkpoint.init_from`), and the refusal of those of another model.

Compares names, shapes and configs; reads no tensor. Imports no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from megatrain.checkpoint.find import lora_of, model_of, tokenizer_folder
from megatrain.checkpoint.manifest import Manifest
from megatrain.checkpoint.resume import changed_keys, override_of
from megatrain.config import ModelConfig, TrainConfig
from megatrain.config.plain import plain
from megatrain.config.values import quoted
from megatrain.data.card import Card, made_by
from megatrain.data.tokenizer import saved_meta
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.model.count import parameter_shapes

LABELS = ("model.name", "model.init_std", "model.output")
"""Keys that say nothing of the weights that a run takes: an output that the checkpoint lacks is drawn anew."""

MEANING = (
    "model.num_heads",
    "model.num_kv_heads",
    "model.hidden_size",
    "model.head_size",
    "model.ffn_size",
    "model.norm",
    "model.norm_place",
    "model.position",
    "model.activation",
)
"""Keys that fix what the weights mean: with another value they would be noise, so no override allows it."""

TOKENIZER = "tokenizer"
"""The word for the tokenizer in `checkpoint.override`."""

VOCABULARY = "model.vocab_size"

QUANTIZED = ("int8.", "int4.")
"""How the names of quantised weights in a checkpoint begin."""

SHOWN = 6
"""Most names that a message lists."""


@dataclass(frozen=True)
class Transfer:
    """The parameters that a new run takes from a checkpoint, draws anew, and leaves in the checkpoint, by name.

    `changed` are the keys of `model.*` that differ, as `{key: (checkpoint's, run's)}`.
    """

    taken: list[str]
    drawn: list[str]
    left: list[str]
    changed: dict[str, tuple[Any, Any]]

    def describe(self) -> dict[str, Any]:
        """Return what the event `init_from` says of it."""
        changed = [f"{key} {plain(before)} → {plain(now)}" for key, (before, now) in self.changed.items()]
        return {
            name: names for name, names in (("changed", changed), ("drawn", self.drawn), ("left", self.left)) if names
        }


def plan_transfer(folder: Path, manifest: Manifest, model: ModelConfig, override: Iterable[str]) -> Transfer:
    """Return which weights of the checkpoint `folder` a run with this `model` takes.

    Raises:
        CheckpointError: the run's model differs in a key that `override` does not name, or the checkpoint's tensors are
            not those of its own model. The message names the keys or the tensors.
    """
    theirs = model_of(folder, manifest)
    changed = changed_keys({"model": asdict(theirs)}, {"model": asdict(model)})
    changed = {key: values for key, values in changed.items() if key not in LABELS}
    if contradicted := {key: values for key, values in changed.items() if key not in override or key in MEANING}:
        raise CheckpointError(_refusal(folder, contradicted))
    if model.position == "learned" and "model.max_seq_len" in changed:
        raise CheckpointError(
            f"model.max_seq_len={model.max_seq_len}: {folder} has learned positions for {theirs.max_seq_len} tokens, "
            f"and no override can change their number; give model.max_seq_len={theirs.max_seq_len}"
        )
    if lora_of(manifest):
        raise CheckpointError(
            f"{folder} holds low-rank layers beside the weights; merge them first: megatrain import "
            f"{shlex.quote(str(folder))} out=<folder>; megatrain tune does so by itself"
        )
    own, wanted = parameter_shapes(theirs), parameter_shapes(model)
    _check_tensors(folder, manifest, own)
    return Transfer(
        taken=[name for name in wanted if own.get(name) == wanted[name]],
        drawn=[name for name in wanted if own.get(name) != wanted[name]],
        left=[name for name in own if own[name] != wanted.get(name)],
        changed=changed,
    )


def weights_fit(folder: Path, manifest: Manifest, card: Card, dataset: Path, config: TrainConfig) -> bool:
    """Return whether a run with this config and dataset can begin from the weights of the checkpoint `folder`."""
    try:
        check_tokenizer(folder, manifest, card, dataset, config)
        plan_transfer(folder, manifest, config.model, config.checkpoint.override)
    except (CheckpointError, ConfigError, DataError):
        return False
    return True


def check_tokenizer(folder: Path, manifest: Manifest, card: Card, dataset: Path, config: TrainConfig) -> None:
    """Refuse a dataset whose tokenizer or vocabulary is not the checkpoint's, unless the config says that it is meant.

    Raises ConfigError with both ways out. A dataset that names no tokenizer is accepted.
    """
    if card.tokenizer is None:
        return
    place, given, vocab = tokenizer_folder(folder, manifest), config.checkpoint.override, card.tokenizer.vocab_size
    theirs = saved_meta(place)["fingerprint"] if place else card.tokenizer.fingerprint
    needed = [TOKENIZER] if theirs != card.tokenizer.fingerprint else []
    size = model_of(folder, manifest).vocab_size or 0
    too_small = vocab > (vocab if config.model.vocab_size is None else config.model.vocab_size)
    if vocab > size:
        needed.append(VOCABULARY)
    if set(needed) <= set(given) and not (too_small and vocab > size):
        return
    larger = f", of {vocab:,} tokens, more than model.vocab_size={size}" if vocab > size else ""
    meant = [override_of(dict.fromkeys((*given, *needed)))]
    meant += [f"{VOCABULARY}={vocab}"] if vocab > size else []
    effect = "the embeddings are then drawn anew" if vocab > size else "the embeddings then stand for other tokens"
    raise ConfigError(
        f"data.name: {dataset} was prepared with another tokenizer than that of checkpoint.init_from={folder}{larger}, "
        f"so its ids mean other text; either {_again(card, dataset, place)}, or, if it is meant, add "
        f"{' '.join(meant)} ({effect})"
    )


def _again(card: Card, dataset: Path, place: Path | None) -> str:
    """Return how to prepare a dataset with the tokenizer saved in `place`, under another name."""
    if place is None:
        return "prepare it with the tokenizer that made the checkpoint's data"
    free = next(name for n in count(2) if not (dataset.parent / (name := f"{card.name}_{n}")).exists())
    if not (words := made_by(card)):
        return f"prepare its text under another data.name with {tokenizer_arguments(place)}"
    named = [quoted("data.name", free), quoted("data.dir", str(dataset.parent))]
    return (
        f"prepare it with the checkpoint's tokenizer (megatrain prepare {shlex.join([*words, *named])} "
        f"{tokenizer_arguments(place)}) and give {shlex.quote(named[0])}"
    )


def tokenizer_arguments(folder: Path) -> str:
    """Return the arguments of `megatrain prepare` that use the tokenizer saved in `folder`."""
    return f"tokenizer={saved_meta(folder)['kind']} {shlex.quote(quoted('tokenizer.path', str(folder)))}"


def _check_tensors(folder: Path, manifest: Manifest, own: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a checkpoint holds exactly the parameters that its own config describes."""
    if any(name.startswith(QUANTIZED) for name in manifest.tensors):
        raise CheckpointError(quantized_message(folder, manifest))
    prefix = "model."
    stored = {name.removeprefix(prefix): t.shape for name, t in manifest.tensors.items() if name.startswith(prefix)}
    problems = []
    if missing := [name for name in own if name not in stored]:
        problems.append(f"lacks {_listed(missing)}")
    if extra := [name for name in stored if name not in own]:
        problems.append(f"holds {_listed(extra)} besides")
    if wrong := [name for name in own if name in stored and stored[name] != own[name]]:
        shapes = [f"{name} of shape {list(stored[name])} in place of {list(own[name])}" for name in wrong]
        problems.append(f"has {_listed(shapes)}")
    if problems:
        raise CheckpointError(
            f"{folder}: the weights are not those of the model that its manifest.json describes: it "
            f"{'; it '.join(problems)}"
        )


def quantized_message(folder: Path, manifest: Manifest) -> str:
    """Return the message for a checkpoint of quantised weights where others are needed."""
    sources = manifest.identity.made_from.get("sources") or [{}]
    return (
        f"{folder} holds quantised weights ({manifest.identity.made_from.get('to')}), which are for evaluating and "
        f"sampling alone; take the model that they were made from: {sources[0].get('path')}"
    )


def _refusal(folder: Path, contradicted: Mapping[str, tuple[Any, Any]]) -> str:
    listed = ", ".join(
        f"{key} is {plain(before)} there and {plain(now)} here" for key, (before, now) in contradicted.items()
    )
    fixed = [key for key in contradicted if key in MEANING]
    message = (
        f"checkpoint.init_from={folder} holds the weights of another model: {listed}; leave model and model.* out, "
        f"and the checkpoint's own values are used"
    )
    if fixed:
        return f"{message} (weights cannot be carried over to another {', '.join(fixed)})"
    return f"{message}, or, if it is meant, give {override_of(contradicted)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more

"""A start of `megatrain train` against the checkpoint it would load, before any rank exists. Imports no torch.

The ranks check the same again (`training/job.py`), with verified files. Here a mistake costs a second, not a job.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.checkpoint.continued_mixture import check_run_caps, continue_mixture
from megatrain.checkpoint.find import model_of, peek, tokenizer_folder
from megatrain.checkpoint.manifest import Manifest, Progress, check_coverage, read_manifest, verify_file
from megatrain.checkpoint.naming import checkpoint_step, list_checkpoints
from megatrain.checkpoint.rescue import RESCUED
from megatrain.checkpoint.resume import check_resume, take_over
from megatrain.checkpoint.weights import check_tokenizer, plan_transfer, tokenizer_arguments, weights_fit
from megatrain.config import DataConfig, ModelConfig, PrepareConfig, TrainConfig, walk
from megatrain.config.choices import CONFIG_DIR, CONFIG_FILE, GROUPS, SEARCH_PATH
from megatrain.config.compose import compose, last_words, own_folders, read_overrides
from megatrain.config.flatten import flatten
from megatrain.config.own_dataset import find_dataset
from megatrain.config.values import as_text, quoted
from megatrain.data.card import Card, with_vocabulary
from megatrain.data.mixed_dataset import Mixture
from megatrain.data.mixture_settings import first_sample, read_phases
from megatrain.distributed.rank_environment import was_requeued
from megatrain.errors import CheckpointError, ConfigError
from megatrain.optim.schedule import samples_before
from megatrain.resilience.owner import is_held
from megatrain.training.history import refuse_if_lost, refuse_to_overwrite
from megatrain.verbs.places import require

INIT_FROM = "checkpoint.init_from"

ACTING = {"seed", "data.name", "data.dir", "data.kind", "data.mixture", "data.mixture_temperature", "data.phases"}
ACTING |= {"data.bos", "data.packing", "data.verify"}
"""Keys of `prepare` that act in `train` too, or are compared with the dataset when it is opened."""

UNRECORDED = ("data.workers", "data.overwrite")
"""Keys of `prepare` that leave no trace in the dataset."""


def with_checkpoint_model(verb: str, overrides: Sequence[str]) -> list[str]:
    """Return the overrides of a command, preceded by the model of `checkpoint.init_from` as its default.

    A model that the command chooses (`model=<preset>`, or an experiment with one) stays: `check_origin` compares it.
    Raises ConfigError if there is no such checkpoint.
    """
    given = list(overrides)
    if not any(text.lstrip("+").startswith(f"{INIT_FROM}=") for text in given):
        return given
    request = read_overrides(verb, given)
    path = request.values.get(INIT_FROM)
    if path is None or "model" in request.groups or _experiment_sets_model(verb, given):
        return given
    place = Path(path).expanduser()
    require(INIT_FROM, place)  # before any complaint about the sizes of a default model
    found = peek(place)
    if found is None:
        return given  # whoever loads it says what is wrong
    try:
        model = asdict(model_of(*found))
    except CheckpointError:
        return given
    if model["output"] == ModelConfig().output:
        del model["output"]  # a method may give the weights another output
    return [*(f"model.{name}={as_text(value)}" for name, value in model.items()), *given]


def _experiment_sets_model(verb: str, overrides: list[str]) -> bool:
    """Return whether the command's experiment changes the default model."""
    groups = [text for text in overrides if "." not in text.partition("=")[0]]
    without = [text for text in groups if not text.lstrip("+").startswith("experiment=")]
    return groups != without and compose(verb, groups).model != compose(verb, without).model


def check_origin(config: TrainConfig, card: Card, mixture: Mixture | None = None) -> None:
    """Refuse a resume, or a start from weights, that the ranks would refuse.

    Raises:
        CheckpointError: the config contradicts the checkpoint, or all checkpoints of the run are gone.
        ConfigError: the choice of the checkpoint contradicts itself, or the data has another tokenizer.
        DataError: the dataset is not the run's.
    """
    run_dir = Path(config.run.dir) / str(config.run.name)
    checkpoints = run_dir / "checkpoints"
    if (checkpoints / RESCUED).exists():
        return  # only the ranks know what they can assemble from these copies
    resume, origin = config.checkpoint.resume, config.checkpoint.init_from
    if origin is not None:
        _refuse_own_weights(Path(origin), run_dir)
    if resume == "never" and not was_requeued():
        refuse_to_overwrite(checkpoints)
    if resume == "auto":
        refuse_if_lost(run_dir)
    dataset = mixture.folder if mixture else Path(config.data.dir) / config.data.name
    found = _to_continue(resume, checkpoints)
    weights = peek(Path(origin)) if found is None and origin is not None and resume in ("auto", "never") else None
    if weights:  # before the vocabulary is compared: another tokenizer explains another size
        check_tokenizer(*weights, card, dataset, config)
    config = with_vocabulary(config, card, dataset)
    changed: dict[str, tuple[Any, Any]] | None = None
    if found:
        folder, manifest = found
        fit = partial(weights_fit, folder, manifest, card, dataset, config)
        changed = check_resume(manifest, asdict(config), None if mixture else card.fingerprint, str(folder), fit)
        if mixture:
            mixture = continue_mixture(manifest, mixture, config.train, changed, str(folder))
        progress = take_over(manifest, changed)[0]
    else:
        progress = Progress(skip_ranges=[(start, stop) for start, stop in config.train.skip_ranges])
    if mixture is not None:
        check_run_caps(mixture, config.train, progress, changed)
    if weights:
        plan_transfer(*weights, config.model, config.checkpoint.override)


def finished_step(config: TrainConfig) -> int | None:
    """Return the step of a run that has nothing left to do, or None if it has, or only its ranks can tell.

    Call it after `check_origin`. The newest checkpoint must have all steps and intact files, since the ranks would
    continue from the one before a damaged one, and the command must change no key.
    """
    run_dir = Path(config.run.dir) / str(config.run.name)
    checkpoints = run_dir / "checkpoints"
    newest = next(iter(list_checkpoints(checkpoints)), None)
    if newest is None or (checkpoint_step(newest) or 0) < config.train.steps or config.checkpoint.resume != "auto":
        return None
    if (checkpoints / RESCUED).exists() or is_held(run_dir):
        return None
    try:
        manifest = read_manifest(newest)
        check_coverage(newest, manifest)
    except CheckpointError:
        return None
    saved, now = flatten(manifest.identity.config), flatten(asdict(config))
    if now["model.vocab_size"] is None:  # the dataset's, which `check_origin` has compared
        saved["model.vocab_size"] = None
    if any(saved.get(key) != now.get(key) for key in saved.keys() | now.keys() if not key.startswith("run.")):
        return None
    if any(verify_file(newest, name, recorded) for name, recorded in manifest.files.items()):
        return None
    return manifest.step


def real(path: Path) -> Path:
    """Return a path without symbolic links; unlike `Path.resolve`, a loop of them is no error."""
    return Path(os.path.realpath(path))


def _to_continue(resume: str, checkpoints: Path) -> tuple[Path, Manifest] | None:
    """Return the checkpoint that the ranks would most likely continue; None for a new run, or if none can be read."""
    own = real(checkpoints)
    if resume not in ("auto", "never"):
        place = real(Path(resume))
        if place in (own, own.parent) or place.parent == own or not list_checkpoints(checkpoints):
            return peek(Path(resume))
    return peek(checkpoints)


def _refuse_own_weights(origin: Path, run_dir: Path) -> None:
    """Refuse to start a run from its own checkpoint: it would be continued, not started."""
    run, weights = real(run_dir), real(origin)
    if run in (weights, *weights.parents):
        raise ConfigError(
            f"{INIT_FROM}={origin} belongs to the run {run_dir.name} itself, which would be continued; give "
            f"run.name=<new name> to start a new run from its weights, or leave {INIT_FROM} out to continue it"
        )


def ignored_keys(config: TrainConfig, overrides: Sequence[str]) -> Iterator[str]:
    """Yield a warning for each key of a `train` command that acts only in `prepare`, unless the dataset has its value.

    Keys of a saved config or an experiment are not the command's, so they give no warning.
    """
    given = read_overrides("train", list(overrides))
    names = {*given.values, *(["tokenizer.kind"] if "tokenizer" in given.groups else [])}
    default, ours = flatten(asdict(PrepareConfig())), flatten(asdict(config))
    names = {name for name in names & set(default) - ACTING if not name.startswith("launch.")}
    if not names:
        return
    mixed, folder = bool(read_phases(config.data)), Path(config.data.dir) / config.data.name
    card = None if mixed else Card.load(folder)
    was = default | (flatten(card.config) if card else {})
    for name in sorted(names):
        had = [was[name]]
        if name == "tokenizer.vocab_size" and card and card.tokenizer:
            had.insert(0, card.tokenizer.vocab_size)  # perhaps of a tokenizer that was not trained here
        if ours[name] in had:
            continue
        has = "; data=mixture takes datasets that are prepared" if mixed else f"; {folder} has {as_text(had[0])}"
        yield (
            f"{name}={as_text(ours[name])} acts in megatrain prepare and does nothing here"
            f"{'' if name in UNRECORDED else has}; leave it out, or prepare the dataset again under another data.name"
        )


def unreached_phases(config: TrainConfig) -> Iterator[str]:
    """Yield a note for each phase of the mixture that begins after the run's last step."""
    loop = config.train
    end = samples_before(loop, loop.steps + 1)
    for phase in read_phases(config.data):
        if first_sample(phase, loop.seq_len, partial(samples_before, loop)) >= end:
            start = f"at step {phase.from_step:,}" if phase.from_step else f"after {phase.from_tokens:,} tokens"
            length = f"train.steps={loop.steps}" + ("" if phase.from_step else f", {end * loop.seq_len:,} tokens")
            yield f"{phase.place} begins {start}, after the end of the run ({length}), so it has no effect"


def prepare_command(config: TrainConfig, overrides: Sequence[str]) -> str:
    """Return the command that prepares the data of a `train` command with these overrides.

    It has those of its words that `prepare` reads, and the tokenizer of `checkpoint.init_from`.
    """
    data = config.data
    known = {*walk(PrepareConfig), *GROUPS["prepare"], CONFIG_DIR, CONFIG_FILE, SEARCH_PATH}
    known = {name for name in known if name.partition(".")[0] != "launch"} - {"data.name", "data.dir"}
    words = last_words(overrides, known)
    chosen = last_words(words, ("data",))
    if chosen and find_dataset(chosen[0].partition("=")[2].strip("'\""), data.dir, own_folders(overrides)):
        words = [word for word in words if word not in chosen] + ["data=files"]
    if not last_words(overrides, ("data", CONFIG_FILE)):
        words.append(f"data={data.name if data.kind == 'huggingface' else data.kind}")
    if data.kind in ("files", "megatron") and not data.paths:
        words.append("data.paths=[<paths>]")
    words.append(quoted("data.name", data.name))
    if data.dir != DataConfig().dir:
        words.append(quoted("data.dir", data.dir))
    found = peek(Path(config.checkpoint.init_from)) if config.checkpoint.init_from else None
    place = tokenizer_folder(*found) if found else None
    own = f" {tokenizer_arguments(place)}" if place else ""
    return f"megatrain prepare {shlex.join(words)}{own}"

"""`megatrain tune`: a training run that begins from a base and learns by a method. Imports no torch.

What the base, the data and the method imply becomes words of `megatrain train`, which does everything else: the run's
folder, resuming, restarts, Slurm. A base of another library is imported first, and files of data are prepared.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.checkpoint.find import is_checkpoint, lora_of, model_of, peek, tokenizer_folder
from megatrain.checkpoint.manifest import MANIFEST, read_manifest
from megatrain.checkpoint.naming import checkpoint_step, list_checkpoints
from megatrain.config import SAMPLING, ModelConfig, PrepareConfig, TokenizerConfig, TrainConfig, TuneConfig
from megatrain.config.compose import compose, key_types, read_overrides
from megatrain.config.values import as_text, quoted
from megatrain.data import preparation
from megatrain.data.card import check_dataset
from megatrain.data.chat.settings import KEYS_FOR_CHAT
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.mixture_settings import MIXED
from megatrain.data.prompts import Prompts, check_prompts
from megatrain.data.samples import num_samples
from megatrain.data.tokenizer import saved_meta
from megatrain.distributed.python_process import python_command
from megatrain.distributed.rank_environment import is_launched
from megatrain.errors import CheckpointError, ConfigError
from megatrain.interop.path_kind import kind_of
from megatrain.launch.slurm import Step
from megatrain.report.dataset_page import sample_texts
from megatrain.resilience.terminal import say
from megatrain.verbs.path_checks import check_paths
from megatrain.verbs.places import require
from megatrain.verbs.printer import Printer, printable
from megatrain.verbs.start_checks import INIT_FROM, UNRECORDED, with_checkpoint_model
from megatrain.verbs.value_checks import check_fold, check_values

LONGEST = 2048
"""Most tokens of a sequence that `train.seq_len=null` means."""

WARMUP = 0.03
"""Share of the steps that `optim.warmup_steps=null` means."""

EVALUATIONS = 50
"""At most so many evaluations during training, where `train.eval_every=null` means one an epoch."""

UNKNOWN = 1e6
"""Steps of an epoch that are assumed until the data are known, so that a mistake is found before they are prepared."""

PRUNED = ("pruned", "2:4")
"""Values of `megatrain compress to=` that set weights to zero."""

SHOWN_TOKENS = 120
"""Tokens that are shown of a conversation before training."""

DROPOUT = "model.dropout"
"""The key of the model that a run may have otherwise than its base without more ado."""

ONLY_HERE = key_types(TuneConfig).keys() - key_types(TrainConfig).keys()
"""Keys of `tune` that `train` does not have."""


@dataclass(frozen=True)
class Tuning:
    """What a method of tuning needs of the rest: the kind of source its data comes from, and learning rates.

    `keys` are defaults that its choice in conf/method leaves open, as it is not for tuning alone.
    """

    data: str
    lr: float
    lora_lr: float
    keys: tuple[str, ...] = ()


TUNINGS: dict[str, Tuning] = {
    "sft": Tuning(data="chat", lr=2e-5, lora_lr=1e-4),
    "reward": Tuning(data="pairs", lr=1e-5, lora_lr=1e-5),
    "distill": Tuning(data="chat", lr=2e-5, lora_lr=1e-4, keys=(*KEYS_FOR_CHAT, "optim.weight_decay=0.0")),
    "dpo": Tuning(data="pairs", lr=1e-6, lora_lr=1e-5),
    "grpo": Tuning(data="prompts", lr=1e-6, lora_lr=1e-5),
    "ppo": Tuning(data="prompts", lr=1e-6, lora_lr=1e-5),
}
"""The methods of tuning by `method.name`."""


def train_words(overrides: Sequence[str], make: bool, show: bool = True) -> list[str]:
    """Return the words of `megatrain train` that mean the same as these of `megatrain tune`.

    With `make`, a Hugging Face base is imported and the files of `data.paths` are prepared, unless that is done, and
    with `show` a sample is shown. In a job or under another launcher they must be there already.

    Raises:
        ConfigError, CheckpointError, DataError: as `megatrain train` and `prepare`, or the base is no model.
    """
    given = list(overrides)
    config: TuneConfig = compose("tune", given)
    tuning = _tuning(config)
    if config.data.folds or config.data.fold:
        _check_fold(config)
    make = make and not is_launched() and Step.from_environ() is None
    base = _base_checkpoint(config, make)
    model = _model_of(base)
    asked = read_overrides("tune", given)
    groups = asked.groups
    implied: dict[str, Any] = {
        "run.name": config.run.name or "-".join(name_parts(config)),
        "data.name": dataset_name(config),
        "train.seq_len": config.train.seq_len or min(model.max_seq_len, LONGEST),
        "optim.lr": config.optim.lr or (tuning.lora_lr if config.method.lora.rank else tuning.lr),
    }
    if config.method.lora.rank and "engine" not in groups:
        implied["engine.name"] = "native"
    if "data" not in groups and config.data.kind not in MIXED:
        implied["data.kind"] = tuning.data
    if _is_pruned(base):
        implied |= _kept_zeros(config, make)
    if DROPOUT in asked.values and DROPOUT not in config.checkpoint.override:  # whoever gives it means it
        implied["checkpoint.override"] = [*config.checkpoint.override, DROPOUT]
    words = [quoted(INIT_FROM, str(base)), *tuning.keys, *(f"{key}={as_text(value)}" for key, value in implied.items())]
    if "method" not in groups:
        words.append(f"method={config.method.name}")
    done = {*ONLY_HERE, *implied, *(UNRECORDED if config.data.paths else ())}
    words += [word for word in given if word.partition("=")[0].lstrip("+").replace("/", ".") not in done]
    planned = _checked([*words, *_planned(config, epoch=UNKNOWN)])
    samples = _samples(planned, base, make) if planned.data.kind not in MIXED else None
    if make and show and samples is not None and planned.method.name not in SAMPLING:  # nothing of a prompt counts
        _show_sample(planned)
    epoch = samples and samples / planned.train.global_batch_size
    return [*words, *_planned(config, epoch, samples is None or _has_heldout(planned))]


def _tuning(config: TuneConfig) -> Tuning:
    """Return what the method needs. Raises ConfigError if it is none of tuning, or the base is named twice."""
    if config.checkpoint.init_from is not None:
        raise ConfigError(
            f"{INIT_FROM}={config.checkpoint.init_from}: megatrain tune begins from its first argument, "
            f"{config.path}; leave {INIT_FROM} out"
        )
    if config.method.name not in TUNINGS:
        raise ConfigError(
            f"method={config.method.name} is not a method of tuning; give method={' or '.join(TUNINGS)}, or use "
            "megatrain train"
        )
    return TUNINGS[config.method.name]


# ------------------------------------------------------------------------------------------------------------ the base


def _base_checkpoint(config: TuneConfig, make: bool) -> Path:
    """Return the run or checkpoint to begin from: the base itself, or the checkpoint that it is or was imported into.

    Raises ConfigError if the base is no model, or must be imported and cannot be here.
    """
    path = Path(config.path)
    require("path", path)
    kind, found = kind_of(path), peek(path)
    has_adapters = kind in ("run", "checkpoint") and found is not None and lora_of(found[1]) is not None
    if kind in ("run", "checkpoint") and not has_adapters:
        return path
    source = found[0] if found and has_adapters else path
    if not has_adapters and kind != "huggingface":
        raise ConfigError(
            f"path={path} is {'a prepared dataset' if kind == 'dataset' else 'no model'}; give the base first, a run, "
            "a checkpoint or a Hugging Face folder, and the data as data.name=... or data.paths=[...]"
        )
    out = Path(config.run.dir) / f"{_name_of(path)}-{'merged' if has_adapters else 'imported'}"
    if is_checkpoint(out):
        made_of = read_manifest(out).identity.imported_from
        if made_of is None or os.path.realpath(made_of) != os.path.realpath(source):
            raise ConfigError(f"{out} was made of {made_of}, not of {source}; remove it, or give another run.dir")
        made = (out / MANIFEST).stat().st_mtime
        if any(file.stat().st_mtime > made for file in source.glob("*.safetensors")):
            say(f"warning: {source} is newer than {out}, which was made of it; remove {out} to have it made again")
        return out
    command = ["import", quoted("path", str(source)), quoted("out", str(out))]
    if not make:
        raise ConfigError(f"path={path} must be imported first: megatrain {shlex.join(command)}")
    say(f"merging the low-rank layers of {source} into {out}" if has_adapters else f"importing {path} into {out}")
    done = subprocess.run(python_command("megatrain", *command), capture_output=True, text=True, check=False)
    if done.returncode and not is_checkpoint(out):  # which another process may have made meanwhile
        print(done.stderr, end="", file=sys.stderr)
        raise SystemExit(done.returncode)
    return out


def _model_of(base: Path) -> ModelConfig:
    """Return the base's model. Raises CheckpointError if no checkpoint of it can be read."""
    found = peek(base)
    if found is None:
        raise CheckpointError(f"{base} holds no checkpoint that can be read; megatrain inspect {base} says why")
    return model_of(*found)


def name_parts(config: TuneConfig) -> list[str]:
    """Return the parts of the default name of a run."""
    return [_name_of(Path(config.path)), config.method.name]


def _is_pruned(base: Path) -> bool:
    """Return whether a base was pruned by `megatrain compress`, or is a run that kept such zeros."""
    found = peek(base)
    identity = found[1].identity if found else None
    return identity is not None and (
        identity.made_from.get("to") in PRUNED or bool(identity.config.get("optim", {}).get("keep_zeros"))
    )


def _kept_zeros(config: TuneConfig, make: bool) -> dict[str, Any]:
    """Return the key that keeps a pruned base pruned, if that is possible, and say so."""
    if config.method.lora.rank:
        if make:
            say(f"note: {config.path} is pruned, and low-rank layers fill its zeros where they are merged")
        return {}
    if make and config.optim.keep_zeros is None:
        say(f"{config.path} is pruned, so its zeros stay (optim.keep_zeros=true); optim.keep_zeros=false fills them")
    return {"optim.keep_zeros": config.optim.keep_zeros is not False}


def _name_of(path: Path) -> str:
    """Return the name of a base: of the run for a checkpoint of a run, else of its folder."""
    whole = Path(os.path.realpath(path))
    if checkpoint_step(whole) is not None:
        whole = whole.parent.parent if whole.parent.name == "checkpoints" else whole.parent
    return whole.name


# ------------------------------------------------------------------------------------------------------------ the data


def dataset_name(config: TuneConfig) -> str:
    """Return the name of the dataset: as given or by its files, and by its fold. Raises ConfigError if it has none."""
    data = config.data
    return (data.name or _name_of_files(config)) + (f"-fold{data.fold}of{data.folds}" if data.fold else "")


def _check_fold(config: TuneConfig) -> None:
    """Refuse folds of what cannot be divided or has no held-out loss. Raises ConfigError."""
    check_fold(config.data)
    given = f"data.folds={config.data.folds}"
    if config.method.name in SAMPLING:
        raise ConfigError(f"{given}: method={config.method.name} has no held-out loss to compare; leave it out")
    if not config.data.paths:
        raise ConfigError(f"{given} divides the records of data.paths; a prepared dataset has its split already")


def _name_of_files(config: TuneConfig) -> str:
    if not config.data.paths:
        raise ConfigError(
            "tune needs data: give data.paths=[talks.jsonl], or data.name=... of a dataset that megatrain prepare made"
        )
    stem = Path(config.data.paths[0]).name.partition(".")[0].strip("*?[]") or Path(config.data.paths[0]).parent.name
    return f"{stem or 'data'}-{_name_of(Path(config.path))}"


def _samples(config: TrainConfig, base: Path, make: bool) -> int:
    """Return the number of samples in an epoch; prepare the dataset first if it is to be made of files."""
    folder = Path(config.data.dir) / config.data.name
    if config.data.paths and make:
        prepare = PrepareConfig(seed=config.seed, data=config.data, tokenizer=_tokenizer(config, base))
        check_values(prepare)
        check_paths(prepare)
        preparation.prepare(prepare)
    if not folder.is_dir():
        check_paths(config)  # says what is missing
    card = check_dataset(folder)
    if config.method.name in SAMPLING:
        check_prompts(card, folder, config.method.name)
        prompts = Prompts(IndexedDataset.of_card(folder, "train", card, config.data.verify))
        room = config.train.seq_len, config.method.max_new_tokens
        prompts.check(*room, config.model.vocab, skip=config.data.on_bad_record != "stop")
        return len(prompts) * config.method.group_size
    return num_samples(folder, card, config.data.packing, config.train.seq_len, config.data.verify)


def _has_heldout(config: TrainConfig) -> bool:
    return "heldout" in check_dataset(Path(config.data.dir) / config.data.name).splits


def _tokenizer(config: TrainConfig, base: Path) -> TokenizerConfig:
    """Return how `prepare` loads the base's tokenizer: the one that the command names, or the base's own."""
    if config.tokenizer.path is not None:
        return TokenizerConfig(kind=config.tokenizer.kind, path=config.tokenizer.path)
    found = peek(base)
    place = tokenizer_folder(*found) if found else None
    if place is None:
        raise ConfigError(
            f"path={base} comes without a tokenizer; name the one that made its data: tokenizer=hf tokenizer.path=..."
        )
    inside = Path(os.path.relpath(place))
    return TokenizerConfig(kind=saved_meta(place)["kind"], path=str(place if inside.parts[0] == ".." else inside))


def _show_sample(config: TrainConfig) -> None:
    """Print a conversation with what counts in the loss marked, if the run is new."""
    folder = Path(config.data.dir) / config.data.name
    card = check_dataset(folder)
    run_dir = Path(config.run.dir) / str(config.run.name)
    if list_checkpoints(run_dir / "checkpoints") or not any(split.loss_hashes for split in card.splits.values()):
        return
    printer = Printer()
    for headline, pieces in sample_texts(folder, card, 1, config.seed, SHOWN_TOKENS):
        printer.line(f"{headline}; {printer.legend('what counts in the loss')}:")
        printer.marked([(printable(piece.text), piece.counts) for piece in pieces])


# ------------------------------------------------------------------------------------------------------------ the plan


def _checked(words: Sequence[str]) -> TrainConfig:
    """Return the config of `megatrain train` with these words. Raises ConfigError."""
    config: TrainConfig = compose("train", with_checkpoint_model("train", words))
    check_values(config)
    return config


def _planned(config: TuneConfig, epoch: float | None, evaluates: bool = True) -> list[str]:
    """Return the words of the run's length and what depends on it. `epoch` is the steps of one, if they are known.

    `evaluates` says whether there are held-out data.

    Raises ConfigError if the length is not given and not known.
    """
    steps = config.train.steps
    if steps is None and epoch is None:
        raise ConfigError("train.steps is not set; several datasets have no common epoch: give train.steps=...")
    words = []
    if steps is None:
        assert epoch is not None
        steps = max(1, math.ceil(config.method.epochs * epoch))
        words.append(f"train.steps={steps}")
    if config.optim.warmup_steps is None:
        begun = _begun_warmup(config)
        words.append(f"optim.warmup_steps={math.ceil(WARMUP * steps) if begun is None else begun}")
    if config.train.eval_every is None:
        every = max(epoch, steps / EVALUATIONS) if epoch and evaluates else 0
        words.append(f"train.eval_every={min(steps, math.ceil(every))}")
    return words


def _begun_warmup(config: TuneConfig) -> int | None:
    """Return the warm-up that the run began with, which stays when the run is made longer; None for a new run."""
    name = config.run.name or "-".join(name_parts(config))
    found = peek(Path(config.run.dir) / name / "checkpoints")
    begun: int | None = found[1].identity.config.get("optim", {}).get("warmup_steps") if found else None
    return begun

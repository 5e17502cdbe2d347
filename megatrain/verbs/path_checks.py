"""Checks of a config against the disk and the installed libraries. Imports no torch.

Every message names the key, the given path and what is nearby.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatrain.checkpoint.find import peek, tokenizer_folder
from megatrain.checkpoint.teacher import check_recorded_teacher
from megatrain.config import (
    SAMPLING,
    CompressConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    InspectConfig,
    LayoutsConfig,
    MergeConfig,
    PrepareConfig,
    ReportConfig,
    ServeConfig,
    TokenizerConfig,
    TrainConfig,
)
from megatrain.config.choices import special_file
from megatrain.config.suggest import did_you_mean
from megatrain.config.values import exists, path_values
from megatrain.data.card import Card, check_dataset, with_vocabulary
from megatrain.data.chat.settings import KEYS_FOR_CHAT
from megatrain.data.corpus.file_kinds import kind_of
from megatrain.data.corpus.file_search import matches
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.mixed_dataset import open_mixture
from megatrain.data.packing_index import open_packing
from megatrain.data.prompts import check_prompts, holds_prompts
from megatrain.data.samples import BEST_FIT, num_samples
from megatrain.distributed.rank_environment import is_launched
from megatrain.errors import ConfigError, EnvironmentFault, how_to_install
from megatrain.optim.schedule import samples_before
from megatrain.tracking.sweep_record import is_sweep_folder
from megatrain.verbs.evaluation_checks import check_evaluation
from megatrain.verbs.method_checks import check_method_files
from megatrain.verbs.places import require
from megatrain.verbs.preference_checks import check_pairs
from megatrain.verbs.start_checks import check_origin, prepare_command

RECORDS = ("lines", "json", "parquet", "warc")
"""Kinds of files that are no text of their own."""

STREAMS = ("out", "data")
"""Path keys that may name a device or a FIFO: a report is written to one, and evaluate reads a text from one."""


def check_paths(config: Any, overrides: Sequence[str] = ()) -> None:
    """Check that everything a config reads exists, and that `out` of an export or import does not.

    `overrides` are those of the command, for the advice in messages.

    Raises:
        ConfigError, DataError: a file or folder is missing, unusable or in the way.
        EnvironmentFault: a library that a choice needs is not installed.
    """
    for key, path in path_values(config):
        if key not in STREAMS and (what := special_file(Path(path))):
            raise ConfigError(f"{key}: {path} is {what}, not a file or folder; write what it gives into a file first")
    if isinstance(config, TrainConfig) and not isinstance(config, LayoutsConfig):
        check_start(config)
        check_installed(config)
        check_method_files(config)
        mixture = open_mixture(config, samples_before)
        if mixture is not None:
            for name, source in mixture.cards.items():
                check_documents(config.data, config.train.mask_documents, source, mixture.folders[name])
            card = mixture.card(config.data.name)
        else:
            if not is_launched() and not (Path(config.data.dir) / config.data.name).is_dir():
                check_sources(config.data)
                check_tokenizer(config.tokenizer)
            card = check_dataset_folder(config.data, config.train.mask_documents, prepare_command(config, overrides))
            if config.method.name in SAMPLING:
                check_prompts(card, Path(config.data.dir) / config.data.name, config.method.name)
            check_conversations(config, card)
            check_samples(config, card)
            check_pairs(config, card)
        if config.method.teacher is not None:
            folder = mixture.folder if mixture else Path(config.data.dir) / config.data.name
            check_recorded_teacher(with_vocabulary(config, card, folder), card)
        if not is_launched():  # ranks check it themselves, with verified files
            check_origin(config, card, mixture)
    if isinstance(config, PrepareConfig):
        check_tokenizer(config.tokenizer)
        check_sources(config.data)
        if not exists(f"{config.data.dir}/{config.data.name}"):
            check_writable("data.dir", Path(config.data.dir))
    readers = (EvaluateConfig, GenerateConfig, ServeConfig, ExportConfig, ImportConfig, InspectConfig, ReportConfig)
    if isinstance(config, (*readers, CompressConfig)):
        require("path", Path(config.path))
    if isinstance(config, (EvaluateConfig, GenerateConfig)):
        for path in config.ensemble:
            require("ensemble", Path(path))
    if isinstance(config, EvaluateConfig):
        check_evaluation(config)
        if config.data is not None:
            refuse_records(Path(config.data), Path(config.path))
    if isinstance(config, MergeConfig):
        for path in config.paths:
            require("paths", Path(path))
        if config.base is not None:
            require("base", Path(config.base))
    if isinstance(config, (MergeConfig, CompressConfig)) and config.data is not None:
        require("data", Path(config.data))
    out = config.out if isinstance(config, (EvaluateConfig, ReportConfig)) else None
    if isinstance(config, (ExportConfig, ImportConfig, MergeConfig, CompressConfig)):
        refuse_existing(Path(config.out))
        check_writable("out", Path(config.out))
    if out is not None:
        if Path(out).is_dir():
            what = "report.html" if isinstance(config, ReportConfig) else "scores.json"
            raise ConfigError(f"out={out} is a folder; give the file to write, such as out={out}/{what}")
        target = Path(out).resolve()
        if not exists(out) or target.is_file():  # a device or a FIFO is written to
            check_writable("out", target.parent)


def check_start(config: TrainConfig) -> None:
    """Check that the run's folder is not a sweep's and that the checkpoint to start from exists."""
    folder = Path(config.run.dir) / str(config.run.name)
    check_writable("run.dir", folder)
    if is_sweep_folder(folder):
        raise ConfigError(f"run.name={config.run.name}: {folder} is the folder of a sweep; give another run.name")
    resume, origin = config.checkpoint.resume, config.checkpoint.init_from
    if resume not in ("auto", "never"):
        require("checkpoint.resume", Path(resume), also=("auto", "never"))
    if origin is not None:
        require("checkpoint.init_from", Path(origin))


def check_installed(config: TrainConfig) -> None:
    """Check that the optional libraries this run needs are installed, without importing them."""
    if config.precision.name == "fp8" and find_spec("torchao") is None:
        raise EnvironmentFault(f"precision=fp8 needs torchao: {how_to_install('fp8')}, or use precision=bf16")
    if config.train.tasks_dir is not None:
        require("train.tasks_dir", Path(config.train.tasks_dir))
    if (config.train.tasks or config.train.tasks_dir is not None) and find_spec("lm_eval") is None:
        raise EnvironmentFault(f"train.tasks needs lm-evaluation-harness: {how_to_install('evaluate')}")
    if config.kernels == "triton" and find_spec("triton") is None:
        raise EnvironmentFault(
            "kernels=triton needs Triton: pip install triton (Linux), or use kernels=auto or kernels=reference"
        )


def check_dataset_folder(config: DataConfig, mask_documents: bool, command: str = "megatrain prepare") -> Card:
    """Check that the prepared dataset exists with the recorded file sizes, and marks documents if they matter.

    Return its card. `command` is the one that prepares it.
    """
    folder = Path(config.dir) / config.name
    if not folder.is_dir():
        prepared = sorted(card.parent.name for card in Path(config.dir).glob("*/card.json"))
        near = did_you_mean("data.name=", config.name, prepared)
        hint = f"{near} Or" if near else ";"
        raise ConfigError(
            f"data.name={config.name}: there is no dataset at {folder}{hint} prepare it first: {command}"
            + (f" (prepared so far: {', '.join(prepared)})" if prepared else "")
        )
    card = check_dataset(folder)
    check_documents(config, mask_documents, card, folder)
    return card


def check_samples(config: TrainConfig, card: Card) -> None:
    """Pack the documents of a run's dataset, if they are to be packed and are not yet, before its ranks need it."""
    if config.data.packing == BEST_FIT:
        folder, seq_len = Path(config.data.dir) / config.data.name, config.train.seq_len
        num_samples(folder, card, config.data.packing, seq_len, config.data.verify)


def check_conversations(config: TrainConfig, card: Card) -> None:
    """Check that supervised fine-tuning has conversations, of which replies count; say how many will be cut."""
    if config.method.name != "sft":
        return
    if not any(split.loss_hashes for split in card.splits.values()):
        raise ConfigError(
            f"data.name={config.data.name}: method=sft learns from conversations, and this dataset is plain text; "
            "prepare conversations (megatrain prepare data=chat), or use method=pretrain"
        )
    folder, seq_len, verify = Path(config.data.dir) / config.data.name, config.train.seq_len, config.data.verify
    packed = open_packing(IndexedDataset.of_card(folder, "train", card, verify), seq_len, verify).card
    if packed.cut and not is_launched():
        print(
            f"note: {packed.cut:,} of {packed.documents:,} conversations of {folder} have more than "
            f"train.seq_len={seq_len} tokens and are cut: what follows the cut is learnt without what came before it",
            file=sys.stderr,
        )


def check_documents(config: DataConfig, mask_documents: bool, card: Card, folder: Path) -> None:
    """Check that documents begin with BOS if the config says so, and that their ends are known if they matter."""
    if config.bos and (card.tokenizer is None or card.tokenizer.beginning_of_document is None):
        raise ConfigError(
            f"data.bos=true: the documents of {folder} do not begin with BOS; prepare them again with data.bos=true "
            "under another data.name, or leave data.bos out"
        )
    talks = any(split.loss_hashes for split in card.splits.values()) and not holds_prompts(card)
    if talks and not (config.packing == BEST_FIT and mask_documents):
        raise ConfigError(
            f"data.packing={config.packing}: {folder} has conversations, which must stay whole and apart from one "
            f"another; add {' '.join(KEYS_FOR_CHAT)}"
        )
    if mask_documents and card.tokenizer is None:
        raise ConfigError(
            f"train.mask_documents=true: {folder} has no tokenizer, so its end-of-document token is unknown; prepare "
            f"it with the tokenizer that made it (tokenizer=hf tokenizer.path=...) or set train.mask_documents=false"
        )


def check_tokenizer(config: TokenizerConfig) -> None:
    """Check that a tokenizer given as a path exists. A Hugging Face name is left to the library to find."""
    if config.path is None:
        return
    path = Path(config.path)
    if config.kind != "hf" or is_local(config.path) or path.suffix == ".json":
        require("tokenizer.path", path)


def refuse_records(data: Path, model: Path) -> None:
    """Refuse to evaluate on a file of records, and say how to prepare it with the model's tokenizer."""
    if kind_of(data.name) not in RECORDS or not data.is_file():
        return
    found = peek(model)
    tokenizer = (tokenizer_folder(*found) if found else None) or model  # a Hugging Face folder holds its own
    words = ["data=files", "data.name=test", f"data.paths=[{data}]", f"tokenizer.path={tokenizer}"]
    raise ConfigError(
        f"data={data} holds records, whose braces and names would be scored as text; prepare it (megatrain prepare "
        f"{shlex.join(words)}) and give the dataset"
    )


def check_sources(config: DataConfig) -> None:
    """Check that the files or the folder to prepare a dataset from exist. Opens none of them."""
    for pattern in config.paths if config.kind == "files" else ():
        if not Path(pattern).expanduser().is_dir():
            matches(pattern)
    if config.kind == "huggingface" and config.hf_path is not None and is_local(config.hf_path):
        require("data.hf_path", Path(config.hf_path))


def is_local(name: str) -> bool:
    """Return whether a name is a path, and not that of a repository on the Hugging Face hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def check_writable(key: str, path: Path) -> None:
    """Refuse a path that cannot be made, because the nearest folder above it is no folder or is not writable."""
    folder = path.absolute()
    try:
        while not folder.exists() and not folder.is_symlink():
            folder = folder.parent
        reason = "is not writable" if folder.is_dir() else "is a file" if folder.exists() else "is a link to nowhere"
        if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
            return
    except OSError as error:
        reason = f"cannot be used ({error.strerror})"
    raise ConfigError(f"{key}: {path} cannot be made, because {folder} {reason}; give another {key}")


def refuse_existing(out: Path) -> None:
    """Refuse to overwrite anything. Raises ConfigError if `out` exists."""
    if exists(str(out)):
        raise ConfigError(f"out={out} exists already; give a folder that does not, or remove it")

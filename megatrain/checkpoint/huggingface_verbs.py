"""`megatrain export` and `megatrain import`: between our checkpoints and Hugging Face folders.

The conversion itself is huggingface.py's. An imported checkpoint holds weights alone, so a run starts from it
(`checkpoint.init_from`) but cannot continue it.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from megatrain.checkpoint.huggingface import export_model
from megatrain.checkpoint.load import Loaded, kind_of, load
from megatrain.checkpoint.manifest import sync_folder
from megatrain.checkpoint.store import write
from megatrain.config import ExportConfig, ImportConfig
from megatrain.errors import ConfigError
from megatrain.model.count import num_parameters
from megatrain.trainer import Progress


def export_(config: ExportConfig) -> None:
    """Write the Hugging Face folder `out` of a run's newest valid checkpoint, or of one checkpoint.

    Raises:
        ConfigError: `out` exists or cannot be written, or no class of transformers computes this model.
        CheckpointError: no model that is whole.
    """
    out = Path(config.out)
    refuse_existing(out)
    if kind_of(Path(config.path)) == "huggingface":
        raise ConfigError(f"path={config.path} is a Hugging Face folder already")
    loaded = load(Path(config.path))
    tokenizer = loaded.need_tokenizer() if loaded.tokenizer else None
    try:
        export_model(
            loaded.config,
            loaded.weights,
            out,
            dtype=config.dtype,
            tokenizer_dir=loaded.tokenizer_dir,
            end_of_document=tokenizer.end_of_document if tokenizer else None,
        )
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror})") from error
    report(loaded, out, config.dtype)


def import_(config: ImportConfig) -> None:
    """Write the checkpoint `out` with the weights and the tokenizer of a Hugging Face folder, whole or not at all.

    Raises:
        ConfigError: `out` exists or cannot be written, or `path` is no Hugging Face folder.
        CheckpointError: a folder that is damaged or that our model cannot express.
    """
    out, path = Path(config.out), Path(config.path)
    refuse_existing(out)
    if kind_of(path) != "huggingface":
        raise ConfigError(f"path={path} is not a Hugging Face folder: it has no config.json")
    loaded = load(path)
    try:
        write_weights(loaded, out)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror})") from error
    report(loaded, out, "fp32")


def write_weights(loaded: Loaded, out: Path) -> None:
    """A checkpoint of step 0 with `model.*` tensors alone, fp32, and the tokenizer inside."""
    partial = out.with_name(f".{out.name}.writing-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        if loaded.tokenizer is not None:
            loaded.tokenizer.save(partial / "tokenizer")
        state = {f"model.{name}": tensor.to(torch.float32) for name, tensor in loaded.weights.items()}
        extra = {
            "step": 0,
            **Progress().to_manifest(),
            "optimizer": None,
            "loss_scale": None,
            "config": {"model": asdict(loaded.config)},
            "dataset_fingerprint": None,
            "layout": None,
            "engine": None,
            "imported_from": str(loaded.folder),
        }
        write(partial, state, extra, None)
        os.rename(partial, out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten. Raises ConfigError where there is something."""
    if out.exists():
        raise ConfigError(f"out={out} exists already; give a folder that does not, or remove it")


def report(loaded: Loaded, out: Path, dtype: str) -> None:
    """What was written, on standard error; the folder alone on standard output."""
    count = num_parameters(loaded.config)
    print(f"{loaded.describe()}: {count:,} parameters, {dtype}", file=sys.stderr)
    if loaded.tokenizer is None:
        print("  without a tokenizer: none was found", file=sys.stderr)
    print(out, flush=True)

"""`megatrain import`: a checkpoint with the weights of a Hugging Face folder, or with low-rank layers merged into them.

It holds weights alone: a new run can start from it (`checkpoint.init_from`), but there is no run to resume.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from megatrain.checkpoint.find import lora_of, peek
from megatrain.checkpoint.lineage import find_line
from megatrain.checkpoint.manifest import Identity, RunRecord
from megatrain.checkpoint.store import write
from megatrain.config import ImportConfig
from megatrain.config.values import quoted
from megatrain.data.tokenizer_hf import HuggingFaceTokenizer, read_folder
from megatrain.errors import ConfigError, cannot_write
from megatrain.interop.load_model import Loaded, load
from megatrain.interop.path_kind import kind_of
from megatrain.resilience.atomic_file import remove_abandoned, sync_path, temporary_name
from megatrain.verbs.conversion import print_result
from megatrain.verbs.path_checks import refuse_existing


def import_(config: ImportConfig) -> None:
    """Write the checkpoint `out` with the weights and the tokenizer of a Hugging Face folder, atomically.

    A run with low-rank layers may take its place: they are merged into its weights.

    Raises:
        ConfigError: `out` exists or cannot be written, or `path` is neither.
        CheckpointError: the folder is damaged, or our model cannot express it.
        EnvironmentFault: the disk is full or broken.
    """
    out, path = Path(config.out), Path(config.path)
    refuse_existing(out)
    kind, found = kind_of(path), peek(path)
    if kind != "huggingface" and not (found and lora_of(found[1])):
        raise ConfigError(f"path={path} is not a Hugging Face folder: it has no config.json")
    loaded = load(path)
    try:
        write_weights(loaded, out)
    except OSError as error:
        raise cannot_write(out, error, "out") from error
    is_theirs = kind == "huggingface"
    if is_theirs and not isinstance(loaded.tokenizer, HuggingFaceTokenizer) and read_folder(path).has_chat_template():
        print(f"{path}: without its chat template: that goes along only with a tokenizer.json", file=sys.stderr)
    start = shlex.quote(quoted("checkpoint.init_from", config.out))
    print_result(loaded, out, "fp32", *([] if loaded.config.output == "score" else [f"megatrain train {start}"]))


def write_weights(loaded: Loaded, out: Path) -> None:
    """Write a checkpoint of step 0: only `model.*` tensors, in fp32, and the tokenizer."""
    remove_abandoned(out.parent)
    partial = temporary_name(out)
    partial.mkdir(parents=True)
    try:
        if loaded.tokenizer is not None:
            loaded.tokenizer.save(partial / "tokenizer")
        state = {f"model.{name}": tensor.to(torch.float32) for name, tensor in loaded.weights.items()}
        identity = Identity(
            config={"model": asdict(loaded.config)},
            imported_from=str(loaded.folder),
            generation=loaded.generation(),
            ancestors=find_line(loaded.folder),
        )
        write(partial, state, RunRecord(identity=identity), None)
        os.rename(partial, out)
        sync_path(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

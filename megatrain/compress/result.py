"""Write a model that was made from others: a checkpoint of weights alone that says what it was made from."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.lineage import find_line, joined, line_of
from megatrain.checkpoint.manifest import Ancestor, Identity, RunRecord
from megatrain.checkpoint.one_by_one import write_checkpoint
from megatrain.errors import EnvironmentFault, MegatrainError, cannot_write
from megatrain.interop.huggingface import generation_of
from megatrain.interop.source import Source

Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Names, dtypes and shapes of the tensors to write, in their order."""

SPARE = 2**20
"""Bytes of a checkpoint besides its tensors: header, manifest and tokenizer."""


def write_result(
    out: Path, described: Described, tensors: Iterable[Tensor], sources: Sequence[Source], made_from: dict[str, Any]
) -> None:
    """Write the checkpoint `out` with the tokenizer of the first source that has one, atomically.

    Raises:
        EnvironmentFault: the disk is full or cannot be written.
        ConfigError: `out` cannot be written.
    """
    check_space(out, sum(math.prod(shape) * dtype.itemsize for dtype, shape in described.values()))
    tokenizer = next((source.tokenizer for source in sources if source.tokenizer), None)

    def prepare(folder: Path) -> None:
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")

    record = RunRecord(
        identity=replace(shared_identity(sources), made_from=made_from, ancestors=joined(map(line, sources)))
    )
    try:
        write_checkpoint(out, described, tensors, record, prepare)
    except MegatrainError:
        raise
    except OSError as error:
        raise cannot_write(out, error, "out") from error


def line(source: Source) -> list[Ancestor]:
    """Return the line of models that a source came from, with the source itself if it is a checkpoint."""
    return find_line(source.folder) if source.manifest is None else line_of(source.folder, source.manifest)


def check_space(out: Path, needed: int) -> None:
    """Refuse to begin what does not fit the disk. Raises EnvironmentFault."""
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE:
        raise EnvironmentFault(f"out={out}: needs {needed + SPARE:,} bytes, but {folder} has only {free:,} free")


def shared_identity(sources: Sequence[Source]) -> Identity:
    """Return what the result takes over from its sources: the model, and the dataset if all were trained on one.

    With the dataset go the keys that `evaluate` reads, so that it needs no others.
    """
    first = sources[0]
    config: dict[str, Any] = {"model": asdict(first.config)}
    identities = [source.manifest.identity if source.manifest else None for source in sources]
    ours = identities[0]
    if ours is None:
        return Identity(config=config, generation=generation_of(first.folder))
    same = all(
        i is not None and (i.dataset_fingerprint, i.mixture) == (ours.dataset_fingerprint, ours.mixture)
        for i in identities
    )
    if not same or "data" not in ours.config:
        return Identity(config=config, generation=ours.generation)
    kept = ("seq_len", "mask_documents", "reset_positions")
    loop = {name: value for name, value in ours.config.get("train", {}).items() if name in kept}
    config |= {"data": ours.config["data"], "train": loop}
    return Identity(
        config=config,
        dataset_fingerprint=ours.dataset_fingerprint,
        generation=ours.generation,
        mixture=ours.mixture,
    )

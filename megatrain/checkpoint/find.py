"""Find the checkpoint that a path means, its model and its tokenizer. Verifies no tensor file, imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatrain.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megatrain.checkpoint.naming import checkpoint_step, list_checkpoints
from megatrain.config import LoraConfig, ModelConfig
from megatrain.data.card import CARD, Card
from megatrain.data.tokenizer import META
from megatrain.errors import CheckpointError


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint by its name or contents, damaged or not."""
    return checkpoint_step(path) is not None or (path / MANIFEST).exists()


def peek(path: Path) -> tuple[Path, Manifest] | None:
    """Return the checkpoint at `path`, or the newest of a run folder, with its manifest; None if none can be read."""
    found = [path] if is_checkpoint(path) else [*list_checkpoints(path / "checkpoints"), *list_checkpoints(path)]
    for folder in found:
        try:
            return folder, read_manifest(folder)
        except CheckpointError:
            continue  # whoever loads it says what is wrong
    return None


def model_of(folder: Path, manifest: Manifest) -> ModelConfig:
    """Return the model's config from a manifest.

    Raises:
        CheckpointError: the manifest has no config that this version reads, or its vocabulary size is unknown.
    """
    try:
        config = ModelConfig(**manifest.identity.config["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} holds no model config that this version reads ({error})") from error
    if config.vocab_size is None:
        raise CheckpointError(f"{folder / MANIFEST}: model.vocab_size is null, so the model's size is unknown")
    return config


def lora_of(manifest: Manifest) -> LoraConfig | None:
    """Return the config of the low-rank layers that a checkpoint holds beside the weights; None if it has none.

    Raises CheckpointError if this version does not read it.
    """
    given = manifest.identity.config.get("method", {}).get("lora", {})
    try:
        lora = LoraConfig(**given)
    except TypeError as error:
        raise CheckpointError(
            f"{MANIFEST} holds no config of low-rank layers that this version reads: {error}"
        ) from error
    return lora if lora.rank else None


def tokenizer_folder(folder: Path, manifest: Manifest) -> Path | None:
    """Return the folder of the tokenizer: in the checkpoint, its run's folder, or its dataset if that is unchanged."""
    whole = folder.resolve()
    places = [whole / "tokenizer"]
    if checkpoint_step(whole) is not None:
        places.append((whole.parent.parent if whole.parent.name == "checkpoints" else whole.parent) / "tokenizer")
    if dataset := own_dataset(manifest):
        places.append(dataset / "tokenizer")
    return next((place for place in places if (place / META).is_file()), None)


def own_dataset(manifest: Manifest) -> Path | None:
    """Return the dataset folder that a checkpoint's run was trained on, if it exists and is unchanged.

    A mixture is not one dataset: None.
    """
    data = manifest.identity.config.get("data")
    if not data or manifest.identity.mixture is not None:
        return None
    folder = Path(data["dir"]) / data["name"]
    same = (folder / CARD).is_file() and Card.load(folder).fingerprint == manifest.identity.dataset_fingerprint
    return folder if same else None

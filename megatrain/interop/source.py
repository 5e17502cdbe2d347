"""A trained model as a source of tensors, read one at a time in float32, and what identifies it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatrain.checkpoint.find import lora_of, model_of, tokenizer_folder
from megatrain.checkpoint.manifest import MANIFEST, Manifest, file_hash
from megatrain.checkpoint.one_by_one import TensorReader
from megatrain.checkpoint.weights import QUANTIZED, quantized_message
from megatrain.config import ModelConfig
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import CheckpointError, ConfigError
from megatrain.interop.load_model import Loaded, find_model, load
from megatrain.model.count import parameter_shapes

MODEL = "model."


@dataclass(frozen=True)
class Source:
    """A model in `folder`: its config, its tokenizer (None if it has none) and a fingerprint of its weights.

    A checkpoint is read from the disk tensor by tensor; the weights of a Hugging Face folder are mapped into memory.
    """

    folder: Path
    config: ModelConfig
    manifest: Manifest | None
    tokenizer: Tokenizer | None
    fingerprint: str
    weights: Loaded | TensorReader

    @property
    def step(self) -> int | None:
        """The checkpoint's step; None for a Hugging Face folder."""
        return self.manifest.step if self.manifest else None

    def read(self, name: str) -> Tensor:
        """Return a tensor by its single-device name, float32 on the CPU.

        Raises:
            CheckpointError: it cannot be read, or has values that are NaN or infinite.
        """
        weights = self.weights
        stored = weights.read(MODEL + name) if isinstance(weights, TensorReader) else weights.weights[name]
        tensor = stored.float()
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise CheckpointError(
                f"{self.folder}: tensor {name} has {bad} of {tensor.numel()} values that are NaN or infinite; take an "
                "earlier checkpoint (step=...)"
            )
        return tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter with its name, in the model's order."""
        for name in parameter_shapes(self.config):
            yield name, self.read(name)

    @property
    def bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        if self.manifest is None:
            return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        tensors = {name: entry for name, entry in self.manifest.tensors.items() if name.startswith(MODEL)}
        return sum(math.prod(e.shape) * getattr(torch, e.dtype).itemsize for e in tensors.values())

    def reference(self) -> dict[str, Any]:
        """Return what a result says of this source: its path, step and fingerprint."""
        return {"path": str(self.folder.absolute()), "step": self.step, "fingerprint": self.fingerprint}


def open_source(path: Path, step: int | None = None) -> Source:
    """Open and verify the model at a path: a checkpoint, a run's newest intact one or that of `step`, or a folder.

    Raises:
        ConfigError: there is no model.
        CheckpointError: it is damaged, its weights are quantised, or its own config does not describe them.
    """
    folder, manifest = find_model(path, step)
    if manifest is not None and lora_of(manifest):
        loaded = load(folder)  # its low-rank layers are merged into the weights, which are then all in memory
        return Source(folder, loaded.config, manifest, loaded.tokenizer, _checksum(folder), loaded)
    if manifest is None:
        loaded = load(folder)
        digest = xxhash.xxh3_128("".join(file_hash(file) for file in sorted(folder.glob("*.safetensors"))).encode())
        return Source(folder, loaded.config, None, loaded.tokenizer, digest.hexdigest(), loaded)
    config = model_of(folder, manifest)
    check_stored(folder, manifest, config)
    place = tokenizer_folder(folder, manifest)
    tokenizer = load_tokenizer(place) if place else None
    return Source(folder, config, manifest, tokenizer, _checksum(folder), TensorReader(folder, manifest))


def _checksum(folder: Path) -> str:
    """Return the checksum of a checkpoint's manifest, which has those of its files."""
    return str(json.loads((folder / MANIFEST).read_text())["checksum"])


def check_stored(folder: Path, manifest: Manifest, config: ModelConfig) -> None:
    """Check that a checkpoint holds the parameters of its model, as numbers that can be computed with.

    Raises:
        CheckpointError: one is missing, has another shape, or is stored quantised.
    """
    for name, shape in parameter_shapes(config).items():
        entry = manifest.tensors.get(MODEL + name)
        if entry is None and any(stored.startswith(QUANTIZED) for stored in manifest.tensors):
            raise CheckpointError(quantized_message(folder, manifest))
        if entry is None or tuple(entry.shape) != shape:
            raise CheckpointError(f"{folder}: tensor {name} of the model is missing or has another shape than {shape}")


def check_alike(sources: Sequence[Source]) -> None:
    """Check that all models compute the same function of their weights and read the same ids.

    Raises:
        ConfigError: shapes, families or tokenizers differ; the message names the model and the first key.
    """
    first = sources[0]
    ours = _meaning(first.config)
    for other in sources[1:]:
        theirs = _meaning(other.config)
        if different := [key for key in ours if ours[key] != theirs[key]]:
            listed = ", ".join(f"model.{key} is {ours[key]} and {theirs[key]}" for key in different[:4])
            raise ConfigError(
                f"{first.folder} and {other.folder} are models of different shapes or families ({listed}); only equal "
                "ones can be combined"
            )
        if first.tokenizer and other.tokenizer and first.tokenizer.fingerprint != other.tokenizer.fingerprint:
            raise ConfigError(
                f"{first.folder} and {other.folder} have different tokenizers (fingerprints "
                f"{first.tokenizer.fingerprint} and {other.tokenizer.fingerprint}), so their embeddings stand for "
                "other texts; combine models of one tokenizer"
            )


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """Return what weights mean, with nulls replaced: all keys but labels and those of training."""
    sizes = {"ffn_size": config.ffn_dim, "num_kv_heads": config.kv_heads, "head_size": config.head_dim}
    biases = {"attention_bias": (config.qkv_bias, config.attention_output_bias)}
    return {
        key: value
        for key, value in {**asdict(config), **sizes, **biases}.items()
        if key not in ("name", "init_std", "dropout")
    }

"""Load a trained model from a path: a run, one of its checkpoints, an imported checkpoint or a Hugging Face folder.

The verbs that use a trained model share this. Checksums are verified before anything is used (Hugging Face folders have
none). It only reads, so the run may be training meanwhile. The file formats are in megatrain/checkpoint/ and
huggingface.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.checkpoint.find import lora_of, model_of, tokenizer_folder
from megatrain.checkpoint.manifest import MANIFEST, Manifest
from megatrain.checkpoint.naming import list_checkpoints
from megatrain.checkpoint.one_by_one import TensorReader
from megatrain.checkpoint.store import first_valid, load_weights, verify
from megatrain.checkpoint.weights import quantized_message
from megatrain.config import LoraConfig, ModelConfig
from megatrain.data.tokenizer import META, Tokenizer
from megatrain.data.tokenizer_hf import find_hugging_face
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import CheckpointError, ConfigError
from megatrain.interop.huggingface import generation_of, import_model
from megatrain.interop.path_kind import checkpoints_folder, find_checkpoint, kind_of
from megatrain.kernels.choice import REFERENCE, Kernels
from megatrain.model.count import adapter_shapes
from megatrain.model.gpt import GPT
from megatrain.model.lora import merged
from megatrain.model.quantized import KINDS, SCALE, Quantized, install, linear_of

_LOG = logging.getLogger("megatrain")


@dataclass(frozen=True)
class Loaded:
    """A model and its origin.

    `weights` are whole tensors on the CPU, by single-device name. `tokenizer` was read from the folder
    `tokenizer_dir`. `manifest` is the checkpoint's, or None for a Hugging Face folder. Low-rank layers are merged into
    `weights`; `adapters` has them as they were, and `lora` is their config. Weights that are stored in 8 or 4 bits are
    in `quantized`, not in `weights`.
    """

    folder: Path
    config: ModelConfig
    weights: dict[str, Tensor]
    manifest: Manifest | None
    tokenizer: Tokenizer | None
    tokenizer_dir: Path | None
    adapters: dict[str, Tensor] = field(default_factory=dict)
    lora: LoraConfig | None = None
    quantized: Mapping[str, Quantized] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the origin as text."""
        if self.manifest is None:
            return f"{self.folder} (Hugging Face)"
        return f"{self.folder} (step {self.manifest.step})"

    def run_config(self) -> dict[str, Any]:
        """Return the config of the model's run: only `model` for imported weights, empty for a Hugging Face folder."""
        return self.manifest.identity.config if self.manifest else {}

    def generation(self) -> dict[str, Any]:
        """Return the generation_config.json of the Hugging Face folder that the model is or was imported from, if any.

        Raises `CheckpointError` if it cannot be read.
        """
        return self.manifest.identity.generation if self.manifest else generation_of(self.folder)

    def end_tokens(self) -> frozenset[int]:
        """Return the ids that end a text: the tokenizer's end of a document, and those that the model came with.

        A chat model has several: the end of its turn is not the end of a document.
        """
        given = self.generation().get("eos_token_id")
        found = {token for token in (given if isinstance(given, list) else [given]) if isinstance(token, int)}
        return frozenset(found | ({self.tokenizer.end_of_document} if self.tokenizer else set()))

    def need_tokenizer(self, writes: bool = True) -> Tokenizer:
        """Return the tokenizer, unless `writes` is false for a model that is to write text.

        Raises:
            ConfigError: there is none, it has more ids than the model, or the model gives scores and writes nothing.
        """
        if writes and self.config.output == "score":
            raise ConfigError(
                f"path: {self.folder} is a reward model, which writes no text; give a language model, or "
                "evaluate it on pairs: megatrain evaluate"
            )
        if self.tokenizer is None:
            raise ConfigError(
                f"path: {self.folder} comes without a tokenizer (looked in the folder, its run's folder and its "
                f"dataset); copy the one that made the data to {self.folder / 'tokenizer'}"
            )
        if self.tokenizer.vocab_size > self.config.vocab:
            raise ConfigError(
                f"{self.tokenizer_dir}: the tokenizer has {self.tokenizer.vocab_size} ids, the model only "
                f"{self.config.vocab}: it is not the one that made the model's data"
            )
        return self.tokenizer

    def need_dense(self) -> dict[str, Tensor]:
        """Return all weights. Raises CheckpointError if some are quantised."""
        if self.quantized and self.manifest:
            raise CheckpointError(quantized_message(self.folder, self.manifest))
        return self.weights

    def build(self, device: torch.device, kernels: Kernels = REFERENCE, dtype: torch.dtype = torch.float32) -> GPT:
        """Return the model on `device`, dense weights as `dtype`, in eval mode, with `kernels` as its operations.

        Raises:
            CheckpointError: the weights do not match the config.
        """
        with torch.device("meta"):
            model = GPT(self.config, kernels)
        given = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        given |= {name: weight.shape for name, weight in self.quantized.items()}
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if shapes.keys() != given.keys():
            first = sorted(shapes.keys() ^ given.keys())[0]
            raise CheckpointError(f"{self.folder}: the weights do not match the config's model; see {first}")
        if different := [name for name, shape in shapes.items() if given[name] != shape]:
            raise CheckpointError(f"{self.folder}: the shape of {different[0]} does not match the config")
        for name in self.quantized:
            linear_of(model, name).weight = nn.Parameter(torch.empty(0, device="meta"))  # no memory for a dense one
        model = model.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in self.quantized:
                    parameter.copy_(self.weights[name])
        install(model, self.quantized, device)
        return model.eval()


def load(path: Path, step: int | None = None) -> Loaded:
    """Load the model at a path. For a run, load the checkpoint of `step`.

    Without a step, that is the newest valid one, with a warning of each damaged newer one.

    Raises:
        ConfigError: the path holds no model, or there is no checkpoint of that step.
        CheckpointError: the checkpoint is damaged, or a run has no valid one.
    """
    folder, manifest = find_model(path, step)
    return _load_huggingface(folder) if manifest is None else _load_checkpoint(folder, manifest)


def find_model(path: Path, step: int | None = None) -> tuple[Path, Manifest | None]:
    """Return the folder of the model that `load` would load, and its verified manifest; None for Hugging Face.

    Raises as `load` does.
    """
    if step is not None:
        path = find_checkpoint(path, step)
    kind = kind_of(path)
    if kind == "huggingface":
        return path, None
    if kind == "checkpoint":
        return path, verify(path)
    if kind == "run":
        return _newest(path)
    if kind == "dataset":
        raise ConfigError(f"path={path} is a prepared dataset; give a run, a checkpoint or a Hugging Face folder")
    raise ConfigError(
        f"path={path} is neither a run folder (it would hold checkpoints/), nor a checkpoint ({MANIFEST}), "
        f"nor a Hugging Face folder (config.json)"
    )


def _newest(run: Path) -> tuple[Path, Manifest]:
    folder = checkpoints_folder(run)
    candidates = list_checkpoints(folder)
    if not candidates:
        raise CheckpointError(f"{folder} holds no checkpoint yet")
    damaged: list[str] = []

    def skip(_folder: Path, error: CheckpointError) -> None:
        damaged.append(str(error))
        _LOG.warning("warning: skipping a damaged checkpoint: %s", error)

    found = first_valid(candidates, None, skip)
    if found is None:
        raise CheckpointError(f"all {len(candidates)} checkpoints of {folder} are damaged: {' | '.join(damaged)}")
    return found


def _load_checkpoint(folder: Path, manifest: Manifest) -> Loaded:
    config = model_of(folder, manifest)
    tokenizer_dir = tokenizer_folder(folder, manifest)
    tokenizer = load_tokenizer(tokenizer_dir) if tokenizer_dir else None
    weights = load_weights(folder, manifest)
    lora = lora_of(manifest)
    adapters = {name: weights[name] for name in adapter_shapes(config, lora)} if lora else {}
    weights = merged(weights, lora) if lora else weights
    quantized = _quantized(folder, manifest)
    return Loaded(folder, config, weights, manifest, tokenizer, tokenizer_dir, adapters, lora, quantized)


def _quantized(folder: Path, manifest: Manifest) -> dict[str, Quantized]:
    """Read the quantised weights of a checkpoint; most have none."""
    found = [name.partition(".")[::2] for name in manifest.tensors if name.startswith(tuple(f"{k}." for k in KINDS))]
    reader = TensorReader(folder, manifest) if found else None
    return {
        name: Quantized(kind, reader.read(f"{kind}.{name}"), reader.read(f"{SCALE}.{name}"))
        for kind, name in found
        if reader
    }


def _load_huggingface(folder: Path) -> Loaded:
    config, weights = import_model(folder)
    tokenizer: Tokenizer | None = None
    if (folder / META).is_file():
        tokenizer = load_tokenizer(folder)
    elif (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        tokenizer = find_hugging_face(str(folder.resolve()))
    return Loaded(folder, config, weights, None, tokenizer, folder if tokenizer else None)

"""Load several models that predict together, for `evaluate` and `generate`. `model/ensemble.py` averages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatrain.errors import ConfigError
from megatrain.interop.load_model import Loaded, load
from megatrain.kernels.choice import REFERENCE, Kernels
from megatrain.model.ensemble import Ensemble
from megatrain.model.gpt import GPT


def load_others(first: Loaded, paths: Sequence[str]) -> list[Loaded]:
    """Load the models at `paths`, which are to predict together with `first`.

    Raises:
        ConfigError: one has another tokenizer or vocabulary than the first.
        CheckpointError: one is damaged.
    """
    others = [load(Path(path)) for path in paths]
    for other in others:
        if other.config.vocab != first.config.vocab:
            raise ConfigError(
                f"ensemble: {other.folder} has a vocabulary of {other.config.vocab:,}, {first.folder} one of "
                f"{first.config.vocab:,}; probabilities can only be averaged over the same tokens"
            )
        ours, theirs = first.tokenizer, other.tokenizer
        if ours and theirs and ours.fingerprint != theirs.fingerprint:
            raise ConfigError(
                f"ensemble: {other.folder} has another tokenizer than {first.folder} (fingerprints "
                f"{theirs.fingerprint} and {ours.fingerprint}), so its probabilities are those of other texts; give "
                "models of one tokenizer"
            )
    return others


def build(models: Sequence[Loaded], device: torch.device, kernels: Kernels = REFERENCE) -> GPT | Ensemble:
    """Build the only model, or the ensemble of all, on `device` in eval mode."""
    built = [model.build(device, kernels) for model in models]
    return built[0] if len(built) == 1 else Ensemble(built).eval()

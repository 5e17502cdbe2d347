"""Low-rank layers as peft's files: adapter_config.json and adapter_model.safetensors beside an exported base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.config import LoraConfig, ModelConfig
from megatrain.errors import ConfigError
from megatrain.interop.hf_families import family_of
from megatrain.interop.huggingface import layout
from megatrain.model.count import adapter_shapes
from megatrain.resilience.atomic_file import remove_abandoned, temporary_name


def export_adapter(
    config: ModelConfig, adapters: dict[str, Tensor], lora: LoraConfig, out: Path, family: str | None = None
) -> None:
    """Write the folder `out` for peft's `PeftModel.from_pretrained`, atomically.

    `adapters` are the low-rank layers of a model of this `config` by single-device name. `family` is the `model_type`
    of the exported base, by default the one that `megatrain export` chooses.

    Raises:
        ConfigError: the model has a score, or the family stores several projections as one, so that their low-rank
            layers have no place in it.
    """
    if config.output == "score":
        raise ConfigError(
            "adapter=true: a reward model has learnt its score beside the low-rank layers, and an adapter would lose "
            "it; leave adapter out, and merged weights are written"
        )
    kind = family or family_of(config)
    places = {part: place for place in layout(config, kind) for part in place.parts}
    tensors: dict[str, Tensor] = {}
    modules: set[str] = set()
    for name in adapter_shapes(config, lora):
        layer, _, what = name.rpartition(".")
        place = places[f"{layer}.weight"]
        if len(place.parts) > 1 or place.transposed:
            raise ConfigError(
                f"adapter=true: {kind} stores {layer} in another shape ({place.name}), so peft has no place for its "
                "low-rank layers; leave adapter out, and merged weights are written"
            )
        module = place.name.removesuffix(".weight")
        modules.add(module.rpartition(".")[2])
        tensors[f"base_model.model.{module}.lora_{what[-1].upper()}.weight"] = adapters[name].float().contiguous()
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(modules),
        "bias": "none",
    }
    _write(out, tensors, fields)


def _write(out: Path, tensors: dict[str, torch.Tensor], fields: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    remove_abandoned(out.parent)
    partial = temporary_name(out)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        content = json.dumps(fields, indent=2, sort_keys=True) + "\n"
        (partial / "adapter_config.json").write_text(content, encoding="utf-8")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

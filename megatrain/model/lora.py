"""Low-rank layers beside a model's projections (LoRA, Hu et al., 2021, arXiv:2106.09685): add them, or merge them.

A projection `y = W x` becomes `y = W x + alpha / rank * B A x`. Only A (`lora_a`) and B (`lora_b`) are trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatrain.config import LoraConfig
from megatrain.model.gpt import GPT, Adapter, Block, Linear


def add_adapters(model: GPT, lora: LoraConfig) -> None:
    """Give the projections that `lora` names low-rank layers, uninitialised; freeze all else but score and value."""
    model.requires_grad_(False)
    for head in (model.score, model.value):  # drawn anew or 0, so they must be learnt
        if head is not None:
            head.requires_grad_(True)
    for name, module in model.blocks.named_modules():
        if isinstance(module, Linear) and name.rpartition(".")[2] in lora.targets:
            module.adapter = Adapter(lora.alpha / lora.rank, lora.dropout)
            module.lora_a = nn.Parameter(torch.empty(lora.rank, module.in_features))
            module.lora_b = nn.Parameter(torch.empty(module.out_features, lora.rank))
    if lora.dropout:
        model.has_dropout = True
        for block in model.blocks.children():
            assert isinstance(block, Block)
            block.has_dropout = True


def merged(weights: Mapping[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Return the weights with their low-rank layers merged into them: those of a model without any."""
    result = {name: tensor for name, tensor in weights.items() if not name.endswith((".lora_a", ".lora_b"))}
    for name, output in weights.items():
        layer, _, what = name.rpartition(".")
        if what == "lora_b":
            product = output.float() @ weights[f"{layer}.lora_a"].float()
            result[f"{layer}.weight"] = result[f"{layer}.weight"].float() + lora.alpha / lora.rank * product
    return result

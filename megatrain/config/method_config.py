"""`method.*`: what a run is trained for, and the keys of each method. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatrain.config.key import key

METHODS = ("pretrain", "sft", "dpo")
"""What a run can be trained for."""


TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The projections of a block that can have low-rank layers."""


@dataclass
class LoraConfig:
    """Low-rank layers beside the projections of the blocks (LoRA, Hu et al., 2021, arXiv:2106.09685)."""

    rank: int = key(
        0, "rank of the low-rank layers, which are trained in place of the weights; 0 trains all weights", minimum=0
    )
    alpha: float = key(16.0, "the product of the low-rank layers counts alpha / rank times", above=0)
    targets: list[str] = key(list(TARGETS), "projections of each block that have low-rank layers", each_choices=TARGETS)
    dropout: float = key(0.0, "dropout of the input of the low-rank layers", minimum=0, below=1)


@dataclass
class MethodConfig:
    """What a run is trained for: pretraining, or a method of tuning."""

    name: str = key("pretrain", "what the run is trained for", choices=METHODS)
    beta: float = key(0.1, "method=dpo: how strongly the model is held to the base", above=0)
    label_smoothing: float = key(
        0.0, "method=dpo: share of the pairs that are taken to be labelled the wrong way round", minimum=0, below=0.5
    )
    sft_weight: float = key(
        1.0,
        "method=dpo: weight of the supervised loss of the chosen replies, without which both sides of a pair may "
        "become unlikely",
        minimum=0,
    )
    lora: LoraConfig = field(default_factory=LoraConfig)

"""`method.*`: what a run is trained for, and the keys of each method. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key

METHODS = ("pretrain", "sft")
"""What a run can be trained for."""


@dataclass
class MethodConfig:
    """What a run is trained for: pretraining, or a method of tuning."""

    name: str = key("pretrain", "what the run is trained for", choices=METHODS)

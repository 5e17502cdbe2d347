"""`precision.*`: number formats and loss scaling. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class PrecisionConfig:
    """Number formats. Master weights are always fp32."""

    name: str = key(
        "fp32",
        "number format of parameters and activations; fp8 means bf16 with fp8 in the blocks' linear layers "
        "(native only)",
        choices=("fp32", "bf16", "fp16", "fp8"),
    )
    accumulate_dtype: str = key(
        "fp32", "number format in which gradients are summed over micro-batches", choices=("fp32", "bf16", "fp16")
    )
    reduce_dtype: str = key(
        "fp32", "number format in which gradients are reduced across ranks", choices=("fp32", "bf16", "fp16")
    )
    initial_loss_scale: float = key(2.0**16, "first loss scale (fp16)", minimum=1)
    loss_scale_window: int = key(
        1000, "consecutive steps without overflow after which the loss scale doubles (fp16)", minimum=1
    )
    loss_scale_hysteresis: int = key(2, "overflows after which the loss scale halves (fp16)", minimum=1)
    min_loss_scale: float = key(1.0, "smallest loss scale (fp16)", above=0)

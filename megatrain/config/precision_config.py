"""`precision.*`: number formats and loss scaling. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class PrecisionConfig:
    """Number formats. Master weights are fp32 in every choice."""

    name: str = key(
        "fp32",
        "format of parameters and activations in compute; fp8: bf16, and fp8 inside the blocks' linear layers (native)",
        choices=("fp32", "bf16", "fp16", "fp8"),
    )
    accumulate_dtype: str = key(
        "fp32", "format that gradients of micro-batches are summed in", choices=("fp32", "bf16", "fp16")
    )
    reduce_dtype: str = key("fp32", "format that gradients travel between ranks in", choices=("fp32", "bf16", "fp16"))
    initial_loss_scale: float = key(2.0**16, "first loss scale (fp16)", minimum=1)
    loss_scale_window: int = key(1000, "good steps before the loss scale doubles (fp16)", minimum=1)
    loss_scale_hysteresis: int = key(2, "overflows tolerated before the loss scale halves (fp16)", minimum=1)
    min_loss_scale: float = key(1.0, "smallest loss scale (fp16)", above=0)

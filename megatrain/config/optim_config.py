"""`optim.*`: the optimizer and the learning-rate schedule. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class OptimConfig:
    """Optimizer (AdamW, decay on matrices only) and learning-rate schedule."""

    name: str = key("adamw", "optimizer", choices=("adamw",))
    lr: float = key(3e-4, "peak learning rate", above=0)
    min_lr_ratio: float = key(
        0.1, "final learning rate as a share of the peak (cosine, linear, wsd)", minimum=0, maximum=1
    )
    schedule: str = key("cosine", "learning-rate schedule", choices=("cosine", "linear", "constant", "wsd"))
    warmup_steps: int = key(0, "steps of linear warm-up from 0", minimum=0)
    decay_fraction: float = key(
        0.2, "share of the run that wsd (warmup-stable-decay) spends decaying", above=0, maximum=1
    )
    betas: list[float] = key(
        [0.9, 0.95], "AdamW's decay rates of the first and second moment", each_minimum=0, each_below=1
    )
    eps: float = key(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = key(
        0.1, "decoupled weight decay on matrices; biases, norms and other vectors have none", minimum=0
    )
    grad_clip: float = key(1.0, "largest global gradient norm; 0 does not clip", minimum=0)
    moments: str = key(
        "fp32",
        "format of AdamW's two moments; bf16 takes half the memory, rounds stochastically and needs engine=native",
        choices=("fp32", "bf16"),
    )

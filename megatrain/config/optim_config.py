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
        0.1, "final learning rate as a fraction of the peak (cosine, linear, wsd)", minimum=0, maximum=1
    )
    schedule: str = key("cosine", "learning-rate schedule", choices=("cosine", "linear", "constant", "wsd"))
    warmup_steps: int = key(0, "steps of linear warm-up from 0", minimum=0)
    decay_fraction: float = key(
        0.2, "fraction of the run in which wsd (warmup-stable-decay) decays", above=0, maximum=1
    )
    betas: list[float] = key(
        [0.9, 0.95], "AdamW's decay rates of the first and second moment", each_minimum=0, each_below=1
    )
    eps: float = key(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = key(
        0.1, "decoupled weight decay on matrices; not applied to biases, norms and other vectors", minimum=0
    )
    grad_clip: float = key(1.0, "global gradient norm above which gradients are clipped; 0 never clips", minimum=0)
    keep_zeros: bool = key(
        False,
        "leave the zeros of all matrices as they are, so that a pruned model stays pruned; megatrain tune sets it for "
        "a base that megatrain compress pruned",
    )
    moments: str = key(
        "fp32",
        "number format of AdamW's two moments; bf16 halves their memory, rounds stochastically and needs engine=native",
        choices=("fp32", "bf16"),
    )

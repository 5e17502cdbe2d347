"""AdamW over a model's parameters (Loshchilov and Hutter, 2019): which parameters decay, and the optimizer itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megatrain.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's per-parameter states, by torch's names; a checkpoint keeps them as `optim.<moment>.<parameter>`."""


def decays(num_dims: int) -> bool:
    """Whether a parameter of so many dimensions decays: matrices do, biases and norms do not."""
    return num_dims >= 2


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter, int]], config: OptimConfig) -> list[dict[str, Any]]:
    """Two groups, `decay` and `no_decay`, from (name, parameter, number of dimensions of the whole parameter).

    The dimensions are asked for because a sharded parameter no longer shows them.
    """
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for _, parameter, num_dims in parameters:
        groups["decay" if decays(num_dims) else "no_decay"].append(parameter)
    return [
        {"name": name, "params": members, "weight_decay": config.weight_decay if name == "decay" else 0.0}
        for name, members in groups.items()
        if members
    ]


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW: one pass over each tensor, on CPU as on CUDA."""
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


def materialise(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give every parameter its moments (zeros where it has none yet) and set its step count.

    AdamW makes its states at the first step, but a checkpoint needs somewhere to load into before that.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)

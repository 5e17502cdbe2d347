"""AdamW (Loshchilov and Hutter, 2019): the groups of parameters with and without decay, and the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from megatrain.config import OptimConfig
from megatrain.kernels.adamw_update import adamw_step_, fused_adamw_step_
from megatrain.kernels.support import unsupported
from megatrain.optim.slots import decays

MATRICES = "decay"
"""The name of the group of all matrices."""


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter, int]], config: OptimConfig) -> list[dict[str, Any]]:
    """Split parameters into the groups `decay` and `no_decay`; empty groups are left out.

    Each parameter comes with its name and the number of dimensions of the whole parameter, which a shard does not show.
    """
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    for _, parameter, num_dims in parameters:
        groups["decay" if decays(num_dims) else "no_decay"].append(parameter)
    return [
        {"name": name, "params": members, "weight_decay": config.weight_decay if name == "decay" else 0.0}
        for name, members in groups.items()
        if members
    ]


Places = Mapping[nn.Parameter, tuple[str, int]]
"""For each parameter: its name in the whole model, and the flat index of the first element that this rank holds."""


def adamw(
    groups: list[dict[str, Any]], config: OptimConfig, seed: int = 0, places: Places | None = None
) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, or with `optim.moments=bf16` a `LowMomentsAdamW`.

    Both have the attributes `grad_scale` and `found_inf`, fp32 scalars on the device. `seed` and `places` determine how
    `LowMomentsAdamW` rounds.
    """
    first, second = config.betas
    if config.moments == "bf16":
        return LowMomentsAdamW(groups, config.lr, (first, second), config.eps, torch.bfloat16, seed, places or {})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


class LowMomentsAdamW(torch.optim.Optimizer):
    """AdamW with fp32 parameters and lower-precision moments, rounded stochastically (kernels/adamw_update.py).

    The random bits are a function of the seed, `train_step` (set it before each `step`), the parameter's name and the
    element's index in it. So a resumed run rounds like one that was never stopped, copies of a tied weight stay equal,
    and layouts that shard only rows round alike.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype,
        seed: int,
        places: Places,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.dtype, self.seed = dtype, seed
        self.places = {p: (mixed(name), first) for p, (name, first) in places.items()}
        self.train_step = 0
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; do nothing if `found_inf` is not 0.

        The Triton kernel needs no host sync.
        """
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self.state[p] for p in parameters]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1.0)
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))
            update = fused_adamw_step_ if parameters[0].is_cuda and unsupported(*parameters) is None else adamw_step_
            update(
                parameters,
                [p.grad for p in parameters if p.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                steps[0],
                group["lr"],
                group["betas"],
                group["eps"],
                group["weight_decay"],
                self.found_inf,
                mixed(self.seed, self.train_step),
                self.grad_scale,
                [self.places[p] for p in parameters],
            )


def mixed(*parts: int | str) -> int:
    """Return a 63-bit hash of the parts."""
    return xxhash.xxh3_64_intdigest(":".join(map(str, parts)).encode()) >> 1

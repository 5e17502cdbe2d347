"""Build the optimizer that `optim.name` names, and create its states before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from megatrain.config import OptimConfig
from megatrain.model.dtypes import DTYPES
from megatrain.optim.adamw import MATRICES, Places, adamw
from megatrain.optim.slots import Slot

Factory = Callable[[list[dict[str, Any]], OptimConfig, int, Places], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Factory] = {"adamw": adamw}
"""Constructors by `optim.name`. Arguments: parameter groups, config, the run's seed, the parameters' places."""


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, seed: int = 0, places: Places | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer that `optim.name` names, for these parameter groups."""
    optimizer = OPTIMIZERS[config.name](groups, config, seed, places or {})
    if config.keep_zeros:
        optimizer.register_step_pre_hook(_without_gradients_of_zeros)
    return optimizer


@torch.no_grad()
def _without_gradients_of_zeros(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Set the gradient to 0 where an element of a matrix is 0: then its moments, its decay and its update are 0 too.

    The zeros are their own mask, so no state is needed, and any piece of a matrix will do, in any layout.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["name"] == MATRICES else ():
            if parameter.grad is not None:
                parameter.grad.mul_(parameter != 0)


def create_slots(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[tuple[torch.nn.Parameter, Sequence[tuple[Slot, tuple[int, ...]]]]],
    step: int,
) -> None:
    """Create each parameter's missing states, as zeros of the shape paired with each slot, and set its step count.

    torch's optimizers create their states in the first step, but a checkpoint must be loaded before that.
    """
    for parameter, slots in parameters:
        state = optimizer.state[parameter]
        for slot, shape in slots:
            if slot.name not in state:
                state[slot.name] = _zeros(parameter, shape, DTYPES[slot.dtype])
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)


def _zeros(parameter: torch.nn.Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros. If they have the parameter's shape, they get its memory layout, which the fused kernels need."""
    if shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    return torch.zeros(shape, dtype=dtype, device=parameter.device)

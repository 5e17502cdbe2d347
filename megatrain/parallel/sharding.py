"""ZeRO over data and context ranks, natively: FSDP2 for the stages 1 to 3, its replicating form for stage 0."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatrain.config import PrecisionConfig
from megatrain.model.dtypes import DTYPES
from megatrain.parallel.mesh import Groups


def shard(
    stage: nn.Module, units: list[list[nn.Module]], zero: int, groups: Groups, precision: PrecisionConfig
) -> None:
    """Cut the parameters of a stage over the ranks that share them, each of `units` gathered and reduced as one.

    Gradients are summed over those ranks, never averaged: the loss is divided by the step's tokens beforehand. Parameters
    stay fp32 where they rest; they are gathered in the compute format, and gradients travel in `reduce_dtype`.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if precision.name == "fp32" else DTYPES[precision.name],
        reduce_dtype=None if precision.name == "fp32" else DTYPES[precision.reduce_dtype],
        cast_forward_inputs=False,
    )
    if zero == 0:
        for unit in [*units, [stage]]:
            for module in unit:
                replicate(module, mesh=groups.mesh["replicate"], mp_policy=policy)
    else:
        hybrid = groups.mesh["replicate"].size() > 1
        mesh = groups.mesh["replicate", "shard"] if hybrid else groups.mesh["shard"]
        for unit in [*units, [stage]]:
            fully_shard(unit, mesh=mesh, reshard_after_forward=zero == 3, mp_policy=policy)
        _gather_in_reverse([stage, *(unit[0] for unit in reversed(units))])
    for part in stage.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def _gather_in_reverse(modules: list[nn.Module]) -> None:
    """Have each of `modules`, which are in the order of the backward pass, gather the next one ahead of its turn.

    Left to itself FSDP2 takes the order from the forward passes that it remembers, and after a micro-batch's first unit goes
    on to the micro-batch before: the last one of a step then gathers the head, mostly its largest unit, for nothing.
    """
    for module, following in pairwise([*modules, modules[-1]]):
        assert isinstance(module, FSDPModule) and isinstance(following, FSDPModule)
        module.set_modules_to_backward_prefetch([following])  # the last one names itself: it is gathered already


def before_backward(stage: nn.Module, zero: int, last: bool, reduces_in_fp32: bool) -> None:
    """Say before a micro-batch whether it is the step's last one.

    Stages 0 and 1 reduce once a step, 2 and 3 after every micro-batch; up to stage 2 the gathered parameters stay until
    the step's end. Replicas of hybrid sharding are summed once a step, unless gradients travel in less than fp32: FSDP2
    sums what waits for that in the format in which it travels.
    """
    if isinstance(stage, FSDPModule):
        stage.set_requires_gradient_sync(last or zero >= 2)
        if reduces_in_fp32 and zero >= 2:
            stage.set_requires_all_reduce(last)
        stage.set_is_last_backward(last)
        stage.set_reshard_after_backward(last or zero == 3)


def forget_gathered(stage: nn.Module) -> None:
    """Let go of parameters that are still gathered from the last forward pass: what they rest as has been overwritten."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, whether it is a DTensor or a plain one; shares its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor

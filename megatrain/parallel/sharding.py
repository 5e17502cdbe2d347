"""ZeRO over data and context ranks in the native engine: FSDP2's `fully_shard`, or its `replicate` at stage 0."""

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
    """Shard the parameters of a stage over its data and context ranks; each of `units` is gathered and reduced as one.

    Gradients are summed over those ranks, never averaged: the loss is already divided by the step's tokens. Shards are
    fp32; they are gathered in the compute format, and gradients are reduced in `reduce_dtype`.
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
    """Let each of `modules`, given in the order of the backward pass, prefetch the next one.

    By default FSDP2 reverses the recorded forward order of all the step's micro-batches. After a micro-batch's first
    unit it would prefetch the last unit of the one before. At the step's end that would gather the head, often the
    largest unit, although nothing uses it.
    """
    for module, following in pairwise([*modules, modules[-1]]):
        assert isinstance(module, FSDPModule) and isinstance(following, FSDPModule)
        module.set_modules_to_backward_prefetch([following])  # the last prefetches itself, which is a no-op


def before_backward(stage: nn.Module, zero: int, last: bool, reduces_in_fp32: bool) -> None:
    """Tell FSDP2 before a micro-batch's backward pass whether it is the step's last.

    ZeRO 0 and 1 reduce once a step, 2 and 3 after every micro-batch. Below ZeRO 3 the gathered parameters stay until
    the step's end. Hybrid sharding all-reduces over replicas once a step. If gradients are reduced in less than fp32,
    it does so after every micro-batch, because FSDP2 would sum micro-batches in that format.
    """
    if isinstance(stage, FSDPModule):
        stage.set_requires_gradient_sync(last or zero >= 2)
        if reduces_in_fp32 and zero >= 2:
            stage.set_requires_all_reduce(last)
        stage.set_is_last_backward(last)
        stage.set_reshard_after_backward(last or zero == 3)


def forget_gathered(stage: nn.Module) -> None:
    """Free parameters still gathered from the last forward pass, after their shards were overwritten."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, or a plain tensor itself; shares its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor

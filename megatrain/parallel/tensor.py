"""The tensor-parallel plan as DTensor styles, for the native engine. plan.py says what is cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from megatrain.model.gpt import MLP, Attention, Linear
from megatrain.parallel.pipeline import Stage
from megatrain.parallel.plan import COLUMN, ROW, VOCAB, cut, cut_dimension


def cut_tensors(stage: Stage, mesh: DeviceMesh) -> None:
    """Cut a stage's layers over the ranks of a tensor group, by the plan, with sequence parallelism between them.

    Between layers a rank holds `[B, T / tp, D]`: norms, residual additions and dropout work on that slice of the
    sequence (Korthikanti et al., 2022, arXiv:2205.05198). Attention and feed-forward layers all-gather the sequence at
    their start and reduce-scatter it at their end. The head gives each rank the logits of its part of the vocabulary.
    Norms and learned positions apply whole parameters to a slice, so their gradients must be summed over the ranks
    (`plan.is_summed`).
    """
    sequence, whole = Shard(1), Replicate()
    styles: dict[str, ParallelStyle] = {}
    for name, module in stage.named_modules():
        kind = cut(f"{name}.weight") if isinstance(module, nn.Linear | nn.Embedding) else None
        if isinstance(module, Attention):
            styles[name] = PrepareModuleInput(
                input_layouts=(sequence, None, None, None), desired_input_layouts=(whole, None, None, None)
            )
        elif isinstance(module, MLP):
            styles[name] = PrepareModuleInput(input_layouts=(sequence,), desired_input_layouts=(whole,))
        elif kind == COLUMN:
            styles[name] = ColwiseParallel()
        elif kind == ROW:
            styles[name] = RowwiseParallel(output_layouts=sequence)
        elif kind == VOCAB and isinstance(module, nn.Embedding):
            styles[name] = RowwiseParallel(input_layouts=whole, output_layouts=sequence)
        elif kind == VOCAB:
            styles[name] = ColwiseParallel(input_layouts=sequence, output_layouts=Shard(-1))
        elif isinstance(module, nn.Embedding):  # learned positions: whole, looked up for this rank's slice
            module.register_forward_pre_hook(_slice_of_sequence(mesh))
    adapters = _take_adapters(stage)
    parallelize_module(stage, mesh, styles)
    for name, parameter in adapters.items():
        layer, _, what = name.rpartition(".")
        dimension = cut_dimension(name)
        placement: Placement = whole if dimension is None else Shard(dimension)
        here = nn.Parameter(distribute_tensor(parameter, mesh, [placement]))
        stage.get_submodule(layer).register_parameter(what, here)
    stage.tie()
    if stage.score is not None or stage.value is not None:
        stage.score_join = partial(_joined, group=mesh.get_group())


def _joined(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    apply: Callable[..., Tensor] = _Join.apply
    return apply(values, group)


class _Join(torch.autograd.Function):
    """All-gather along the sequence, of slices from which every rank computes the same loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return `[B, T]` of all ranks' slices `[B, T / tp]`."""
        ctx.size, ctx.rank = group.size(), group.rank()
        parts = [torch.empty_like(values) for _ in range(ctx.size)]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of this rank's slice."""
        return gradients[0].chunk(ctx.size, dim=1)[ctx.rank], None


def _take_adapters(stage: Stage) -> dict[str, nn.Parameter]:
    """Remove the low-rank layers and return them by name: the styles would cut them like the weight beside them."""
    taken = {}
    for name, module in stage.named_modules():
        if isinstance(module, Linear) and module.adapter is not None:
            for what in ("lora_a", "lora_b"):
                taken[f"{name}.{what}"] = getattr(module, what)
                delattr(module, what)
    return taken


def _slice_of_sequence(mesh: DeviceMesh) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    """Return a hook that passes a module this rank's slice of its input's last dimension."""
    size, rank = mesh.size(), mesh.get_local_rank()
    return lambda module, arguments: (arguments[0].chunk(size, dim=-1)[rank],)

"""The tensor-parallel plan, translated to DeepSpeed's AutoTP layers for the deepspeed engine. What is cut is plan.py's.

The layers are put in directly, one at a time while the model is still without memory: AutoTP's own walk over a model cuts
tensors that exist, so that every rank would hold the whole model first. Imports DeepSpeed, which reads its accelerator from
the environment then.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import (
    LinearAllreduce,
    LinearLayer,
    VocabParallelEmbedding,
    VocabParallelLinear,
    set_autotp_mode,
)
from deepspeed.module_inject.tp_shard import AutoTPMeta
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.nn import functional as F

from megatrain.model.gpt import GPT, MLP, Attention
from megatrain.parallel import plan
from megatrain.parallel.context import Attend
from megatrain.parallel.vocabulary import vocabulary_parallel_cross_entropy


def make_tensor_group(tp: int) -> dist.ProcessGroup:
    """This rank's tensor group, the one DeepSpeed's engine will use too. Every rank of the job must call it."""
    set_autotp_mode(training=True)
    groups._init_tp_mesh_device(tensor_model_parallel_size=tp)
    group: dist.ProcessGroup = groups.get_tensor_model_parallel_group()
    first = dist.get_rank() // tp * tp
    assert dist.get_process_group_ranks(group) == list(range(first, first + tp)), "not the layout's tensor ranks"
    return group


def cut_layers(model: GPT, group: dist.ProcessGroup, device: torch.device) -> None:
    """Cut the layers of a model on the meta device over a tensor group and give it memory, one layer at a time.

    Between layers activations are whole on every rank, `[B, T, D]`; the logits stay cut, `[B, T, V / tp]` (Shoeybi et al.,
    2019, arXiv:1909.08053). Four all-reduces of `[B, T, D]` a block: one at the end of each of its two layers, and one at
    their start in the backward pass.
    """
    kernels = model.head.kernels
    for name, module in reversed(list(model.named_modules())):  # the head before the embedding that shares its weight
        if isinstance(module, nn.Linear | nn.Embedding) and plan.cut_dimension(f"{name}.weight") is not None:
            parent, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(parent), own_name, _layer(name, module, model, group, device))
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
        if isinstance(module, Attention | MLP) or module is model.head:
            module.register_forward_pre_hook(lambda _, inputs: (_Enter.apply(inputs[0], group), *inputs[1:]))
        if isinstance(module, Attention):
            module.attend = _OwnMasks(module.attend, group.rank())  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        if plan.cut(name) == plan.HEADWISE:
            parameter.register_hook(partial(_summed, group=group))
    first, _ = plan.chunk(model.config.vocab, group.size(), group.rank())
    model.loss = partial(vocabulary_parallel_cross_entropy, first=first, group=group, kernels=kernels)
    model.ds_autotp_parsed = True  # type: ignore[assignment]  # tells DeepSpeed's engine that nothing is left to cut


def _layer(name: str, module: nn.Module, model: GPT, group: dist.ProcessGroup, device: torch.device) -> nn.Module:
    """The AutoTP layer that takes a layer's place: this rank's block of its parameters, on `device`, without values."""
    kind = plan.cut(f"{name}.weight")
    if isinstance(module, nn.Embedding) and model.config.tie_embeddings:
        return VocabParallelEmbedding(module, group, tied_vocab_parallel_linear=model.head, name=name)
    module.to_empty(device=device)
    size = module.weight.shape[plan.cut_dimension(f"{name}.weight")]  # type: ignore[index]
    # in grains of this size AutoTP cuts as the plan does, the last rank's block the smallest
    meta = AutoTPMeta(tp_grain_size=-(-size // group.size()))
    if isinstance(module, nn.Embedding):
        return VocabParallelEmbedding(module, group, name=name, tp_meta=meta)
    if kind == plan.ROW:
        return _RowLinear(module, group, name=name, tp_meta=meta)
    layer = (VocabParallelLinear if kind == plan.VOCAB else LinearLayer)(module, group, name=name, tp_meta=meta)
    # or query, key and value would each sum the gradient of the input they share; _Enter does, once
    layer.mp_group = None
    return layer


class _RowLinear(LinearAllreduce):
    """AutoTP's row-cut layer, but for where its sums land.

    AutoTP writes them over the matrix product, which selective recompute keeps: the second forward pass would sum sums.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[B, T, F / tp]` to `[B, T, D]`, whole."""
        y = _Leave.apply(F.linear(x, self.weight), self.mp_group)
        return y if self.bias is None else y + self.bias


class _Leave(torch.autograd.Function):
    """The sum of the ranks' parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class _Enter(torch.autograd.Function):
    """What every rank reads whole: the ranks' gradients of it are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _summed(gradients[0], ctx.group), None


def _summed(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    gradient = gradient.contiguous()
    dist.all_reduce(gradient, group=group)
    return gradient


class _OwnMasks:
    """Attention whose dropout masks differ between tensor ranks, which hold different heads.

    Everything else draws the same masks on each of them, because activations there are whole.
    """

    def __init__(self, attend: Attend, tensor_rank: int) -> None:
        self.attend, self.tensor_rank = attend, tensor_rank

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """As `Attend`."""
        if dropout == 0.0:
            return self.attend(q, k, v, mask, dropout)
        seed = int(torch.randint(2**31, ())) + self.tensor_rank  # drawn from the state that all ranks share
        devices = [q.device] if q.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return self.attend(q, k, v, mask, dropout)

"""The tensor-parallel plan as DeepSpeed's AutoTP layers, for the deepspeed engine. plan.py says what is cut.

Layers are replaced one at a time, while the model is still on the meta device. AutoTP's own pass over a model cuts
tensors that already have memory, so every rank would first hold the whole model. Importing this module imports
DeepSpeed, which then reads its accelerator from the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

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

from megatrain.kernels.attention import Documents
from megatrain.model.gpt import GPT, MLP, Attention
from megatrain.parallel import plan
from megatrain.parallel.context import Attend
from megatrain.parallel.vocabulary import (
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_distillation,
    vocabulary_parallel_label_gap,
    vocabulary_parallel_log_probs,
)

if TYPE_CHECKING:  # DeepSpeed carries no types
    RowLinearBase = nn.Module
else:
    RowLinearBase = LinearAllreduce


def make_tensor_group(tp: int) -> dist.ProcessGroup:
    """Return this rank's tensor group, the one that DeepSpeed's engine uses too. Collective over all ranks."""
    set_autotp_mode(training=True)
    groups._init_tp_mesh_device(tensor_model_parallel_size=tp)
    group: dist.ProcessGroup = groups.get_tensor_model_parallel_group()
    first = dist.get_rank() // tp * tp
    assert dist.get_process_group_ranks(group) == list(range(first, first + tp)), "not the layout's tensor ranks"
    return group


def cut_layers(model: GPT, group: dist.ProcessGroup, device: torch.device) -> None:
    """Cut the layers of a model on the meta device over a tensor group and give it memory, one layer at a time.

    Between layers activations are replicated, `[B, T, D]`; the logits stay cut, `[B, T, V / tp]` (Shoeybi et al., 2019,
    arXiv:1909.08053). A block needs four all-reduces of `[B, T, D]`: one at the end of attention and of the MLP in the
    forward pass, and one at the start of each in the backward pass.
    """
    kernels = (model.score or model.head).kernels
    for name, module in reversed(list(model.named_modules())):  # the head before the embedding that shares its weight
        if isinstance(module, nn.Linear | nn.Embedding) and plan.cut_dimension(f"{name}.weight") is not None:
            parent, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(parent), own_name, _layer(name, module, model, group, device))
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
        if isinstance(module, Attention | MLP) or (module is model.head and model.head is not None):
            module.register_forward_pre_hook(lambda _, inputs: (_enter(inputs[0], group), *inputs[1:]))
        if isinstance(module, Attention):
            module.attend = _OwnMasks(module.attend, group.rank())  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        if plan.cut(name) == plan.HEADWISE:
            add_hook: Callable[..., Any] = parameter.register_hook
            add_hook(partial(_all_reduced, group=group))
    first, _ = plan.chunk(model.config.vocab, group.size(), group.rank())
    model.loss = partial(vocabulary_parallel_cross_entropy, first=first, group=group, kernels=kernels)
    model.label_gap = partial(vocabulary_parallel_label_gap, first=first, vocab=model.config.vocab, group=group)
    model.distilled = partial(vocabulary_parallel_distillation, first=first, vocab=model.config.vocab, group=group)
    model.log_probs = partial(vocabulary_parallel_log_probs, first=first, group=group, kernels=kernels)
    model.ds_autotp_parsed = True  # type: ignore[assignment]  # DeepSpeed's engine then cuts nothing itself


def _layer(name: str, module: nn.Module, model: GPT, group: dist.ProcessGroup, device: torch.device) -> nn.Module:
    """Return the AutoTP layer that replaces `module`: this rank's block of its parameters, uninitialised."""
    kind = plan.cut(f"{name}.weight")
    layer: nn.Module
    if isinstance(module, nn.Embedding) and model.config.ties_head:
        layer = VocabParallelEmbedding(module, group, tied_vocab_parallel_linear=model.head, name=name)
        return layer
    module.to_empty(device=device)
    size = module.weight.shape[plan.cut_dimension(f"{name}.weight")]  # type: ignore[index]
    # With this grain size AutoTP cuts as the plan does: the last rank's block is the smallest.
    meta = AutoTPMeta(tp_grain_size=-(-size // group.size()))
    if isinstance(module, nn.Embedding):
        layer = VocabParallelEmbedding(module, group, name=name, tp_meta=meta)
        return layer
    if kind == plan.ROW:
        return _RowLinear(module, group, name=name, tp_meta=meta)
    layer = (VocabParallelLinear if kind == plan.VOCAB else LinearLayer)(module, group, name=name, tp_meta=meta)
    # Query, key and value would each all-reduce the gradient of their shared input. _Enter does it once for all three.
    layer.mp_group = None  # type: ignore[assignment]
    return layer


class _RowLinear(RowLinearBase):
    """AutoTP's row-cut layer, with an all-reduce that is not in place.

    AutoTP all-reduces the matrix product in place, but selective recompute saves that product, so the recomputed
    forward pass would all-reduce it a second time.
    """

    weight: Tensor
    bias: Tensor | None
    mp_group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output `[B, T, D]`, replicated, for `x` `[B, T, F / tp]`."""
        y = _leave(F.linear(x, self.weight), self.mp_group)
        return y if self.bias is None else y + self.bias


def _leave(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    apply: Callable[..., Tensor] = _Leave.apply
    return apply(x, group)


def _enter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    apply: Callable[..., Tensor] = _Enter.apply
    return apply(x, group)


class _Leave(torch.autograd.Function):
    """All-reduce in the forward pass, identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the sum of `x` over the group, in its shape."""
        return _all_reduced(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient as it is."""
        return gradients[0], None


class _Enter(torch.autograd.Function):
    """Identity in the forward pass, all-reduce in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return `x`."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the sum of the gradient over the group, in its shape."""
        return _all_reduced(gradients[0], ctx.group), None


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    dist.all_reduce(x, group=group)
    return x


class _OwnMasks:
    """Attention whose dropout masks differ between tensor ranks, because the ranks hold different heads.

    All other dropout draws the same masks on every tensor rank, because its activations are replicated.
    """

    def __init__(self, attend: Attend, tensor_rank: int) -> None:
        self.attend, self.tensor_rank = attend, tensor_rank

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Documents | None, dropout: float) -> Tensor:
        """Attend; arguments and result are those of `context.Attend`."""
        if dropout == 0.0:
            return self.attend(q, k, v, mask, dropout)
        seed = int(torch.randint(2**31, ())) + self.tensor_rank  # drawn from the random state that tensor ranks share
        devices = [q.device] if q.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return self.attend(q, k, v, mask, dropout)

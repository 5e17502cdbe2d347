"""Activation recompute, applied to a model's blocks from outside: the backward pass runs each block's forward again.

The model has no code for it. A block keeps its parameters, their names and its hooks. Only its class changes, to a
subclass whose call goes through `torch.utils.checkpoint` (Chen et al., 2016, arXiv:1604.06174).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import varlen as varlen  # defines torch.ops.torch_attn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from megatrain.kernels import linear as linear  # defines torch.ops.megatrain.linear
from megatrain.model.gpt import Block
from megatrain.parallel import context as context  # defines torch.ops.megatrain.ring_attention

_ATEN = torch.ops.aten
SAVED_BY_SELECTIVE = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_mm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.megatrain.linear.default,
    torch.ops.megatrain.ring_attention.default,
]
"""Operations whose results `selective` keeps. Norms, rotations and activation functions are recomputed."""


class FullyRecomputed(Block):
    """A block that keeps only its input for the backward pass."""

    make_contexts = staticmethod(noop_context_fn)

    def __call__(self, *arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().__call__(*arguments)
        # Hooks and the compiled form are inside the checkpoint: they run again in the backward pass.
        return checkpoint(
            super().__call__,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=self.has_dropout,
            context_fn=self.make_contexts,
        )


class SelectivelyRecomputed(FullyRecomputed):
    """A block that also keeps the results of `SAVED_BY_SELECTIVE`."""

    make_contexts = staticmethod(partial(create_selective_checkpoint_contexts, SAVED_BY_SELECTIVE))


_CLASSES = {"none": Block, "full": FullyRecomputed, "selective": SelectivelyRecomputed}


def recompute_blocks(blocks: nn.Module, policy: str) -> None:
    """Apply the policy of `train.recompute` to every child of `blocks`, in place.

    `none` keeps everything that the backward pass needs and `full` only each block's input; `selective` also keeps the
    results of matrix products and of attention. Call it before FSDP2's `fully_shard`, which subclasses the block's
    class.
    """
    for block in blocks.children():
        block.__class__ = _CLASSES[policy]

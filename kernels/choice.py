"""Choose the implementation of each operation of a model, plain or fused, by device, dtype and shape."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatrain.kernels.distillation import Sums, Teaching, chunked_linear_distillation, linear_distillation
from megatrain.kernels.gelu import fused_gelu, gelu
from megatrain.kernels.layer_norm import add_layer_norm, fused_add_layer_norm, fused_layer_norm, layer_norm
from megatrain.kernels.linear import linear, onednn_linear, prefers_onednn
from megatrain.kernels.linear_cross_entropy import chunked_linear_cross_entropy_sum, linear_cross_entropy_sum
from megatrain.kernels.linear_log_probs import chunked_linear_log_probs, linear_log_probs
from megatrain.kernels.rms_norm import add_rms_norm, fused_add_rms_norm, fused_rms_norm, rms_norm
from megatrain.kernels.rope import fused_rope_qk, rope_qk
from megatrain.kernels.support import KernelError, unsupported
from megatrain.kernels.swiglu import fused_swiglu, swiglu
from megatrain.kernels.vocabulary_cross_entropy import (
    fused_vocabulary_gradient_,
    fused_vocabulary_statistics,
    vocabulary_gradient_,
    vocabulary_statistics,
)

_LOG = logging.getLogger("megatrain")


@dataclass(frozen=True)
class Kernels:
    """The operations of a model. Each field has the signature and meaning of its default, the plain function."""

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_rms_norm
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = layer_norm
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]] = add_layer_norm
    rope_qk: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rope_qk
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    gelu: Callable[[Tensor], Tensor] = gelu
    linear_cross_entropy_sum: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = linear_cross_entropy_sum
    linear_log_probs: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_log_probs
    linear_distillation: Callable[[Tensor, Tensor, Tensor, Tensor | None, Teaching], Sums] = linear_distillation
    vocabulary_statistics: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]] = vocabulary_statistics
    vocabulary_gradient_: Callable[[Tensor, Tensor, int, Tensor, Tensor | None], None] = vocabulary_gradient_


REFERENCE = Kernels()
CHUNKED = replace(
    REFERENCE,
    linear_cross_entropy_sum=chunked_linear_cross_entropy_sum,
    linear_log_probs=chunked_linear_log_probs,
    linear_distillation=chunked_linear_distillation,
)
ONEDNN = replace(CHUNKED, linear=onednn_linear)
FUSED = Kernels(
    rms_norm=fused_rms_norm,
    add_rms_norm=fused_add_rms_norm,
    layer_norm=fused_layer_norm,
    add_layer_norm=fused_add_layer_norm,
    rope_qk=fused_rope_qk,
    swiglu=fused_swiglu,
    gelu=fused_gelu,
    linear_cross_entropy_sum=partial(chunked_linear_cross_entropy_sum, fused=True),
    linear_log_probs=partial(chunked_linear_log_probs, fused=True),
    linear_distillation=chunked_linear_distillation,
    vocabulary_statistics=fused_vocabulary_statistics,
    vocabulary_gradient_=fused_vocabulary_gradient_,
)
COMPILED = replace(
    REFERENCE,
    linear_cross_entropy_sum=FUSED.linear_cross_entropy_sum,
    linear_log_probs=FUSED.linear_log_probs,
    linear_distillation=FUSED.linear_distillation,
    vocabulary_statistics=fused_vocabulary_statistics,
    vocabulary_gradient_=fused_vocabulary_gradient_,
)


def choose(
    mode: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    compiled: bool,
    splits_backward: bool = False,
    cuts_tensors: bool = False,
) -> Kernels:
    """Return the operations for a model of hidden size `width` that computes in `dtype` on `device`; log the choice.

    Mode `reference` gives the plain operations and `triton` the fused ones. Mode `auto` gives the fused ones where
    Triton can run them, and otherwise the plain ones, with the reason in the log. If the blocks are `compiled`, `auto`
    fuses only head and loss, because torch.compile fuses the blocks' pointwise operations itself. With `auto`, head
    and loss are always computed in chunks, which needs no Triton. On a CPU where oneDNN is faster in fp32
    (`linear.prefers_onednn`), linear layers use it; the chunked head makes that choice itself.

    A pipeline schedule that `splits_backward` keeps residual addition and norm apart, because torch before 2.13 adds up
    the gradients of an operation's two outputs when it splits the backward pass. Such a schedule also keeps torch's
    linear layers, which can compute the gradients of input and weight separately. Tensor parallelism (`cuts_tensors`)
    keeps them too, because DTensor supports no others.

    Raises:
        KernelError: the mode is `triton`, and Triton is missing or does not support the device, shape or dtype.
    """
    if mode == "reference":
        _LOG.info("kernels=reference: the plain operations")
        return REFERENCE
    reason = unsupported(torch.empty(0, dtype=dtype, device=device), row=width)
    if mode == "triton" and reason is not None:
        raise KernelError(reason)
    fused = replace(FUSED, add_rms_norm=add_rms_norm, add_layer_norm=add_layer_norm) if splits_backward else FUSED
    if mode == "triton":
        slow = "" if device.type == "cuda" else ", by Triton's interpreter: slow, for tests"
        _LOG.log(logging.WARNING if slow else logging.INFO, "kernels=triton: the fused operations%s", slow)
        return fused
    if reason is None and device.type != "cuda":
        reason = "Triton's interpreter is for tests"
    if reason is not None:
        whole = not splits_backward and not cuts_tensors
        onednn = device.type == "cpu" and dtype == torch.float32 and whole and prefers_onednn()
        products = ", fp32 products by oneDNN" if onednn else ""
        _LOG.info("kernels=auto: the plain operations (%s), head and loss in chunks%s", reason, products)
        return ONEDNN if onednn else CHUNKED
    if compiled:
        _LOG.info(
            "kernels=auto: the plain operations in blocks (torch.compile fuses them), fused head and loss in chunks"
        )
        return COMPILED
    _LOG.info("kernels=auto: the fused operations")
    return fused

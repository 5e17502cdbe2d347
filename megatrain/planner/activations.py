"""Bytes of activations, by arithmetic from a job's sizes: what the model of model/gpt.py keeps for the backward pass.

Counted as autograd keeps them, tensor by tensor, on one rank and for one micro-batch (after Korthikanti et al., 2022,
arXiv:2205.05198, section 4, whose model differs: here attention is fused, so that nothing grows with the square of the
sequence, norms keep an fp32 copy of their input, and the loss works in fp32). Fused kernels keep less of a block with
RMSNorm and SwiGLU: of those this is an upper bound. Imports no torch. Without dropout inside
attention and without document masks, whose memory depends on the kernel.

Letters: t tokens that a rank works on (micro-batch x sequence / cp), D width, H and G query and key-value heads a rank
holds, K head size, F feed-forward and V vocabulary width a rank holds, w bytes of the compute format.
"""

from __future__ import annotations

from typing import NamedTuple

from megatrain.config import ModelConfig
from megatrain.model.formats import FORMAT_BYTES
from megatrain.parallel import plan


class Activations(NamedTuple):
    """Bytes that one micro-batch leaves on one rank.

    `block` is kept by each block; `first` by the embedding and `last` by the final norm, the head and the loss;
    `recomputed` comes to life in the backward pass of one block and goes with it; `message` is what passes between two
    pipeline stages; `loss` is what the loss works with beside what it keeps.
    """

    block: int
    first: int
    last: int
    recomputed: int
    message: int
    loss: int


class Split(NamedTuple):
    """What of a layout an activation's size depends on."""

    engine: str
    tp: int
    cp: int
    cp_kind: str
    chunk_bytes: int
    """Of logits, where head and loss are computed in chunks; else 0."""
    on_gpu: bool


def count(
    model: ModelConfig, split: Split, precision: str, recompute: str, micro_batch_size: int, seq_len: int
) -> Activations:
    """The activations of a job on one rank; tensor ranks with a smaller vocabulary block hold a little less."""
    w, width = FORMAT_BYTES[precision], model.hidden_size
    tokens = micro_batch_size * seq_len // split.cp
    # Between layers the native engine cuts the sequence over tensor ranks; DeepSpeed's AutoTP keeps it whole.
    between = tokens // split.tp if split.engine == "native" else tokens
    vocabulary = plan.chunk(model.vocab, split.tp, 0)[1]
    norm = between * _norm(width, w, model.norm)
    read = (
        w * tokens * width
    )  # what a layer reads, gathered over tensor ranks, and what it makes before it is scattered
    attention, attention_products = _attention(model, split, tokens, seq_len // split.cp, w)
    mlp, mlp_products = _mlp(model, split, tokens, w)
    dropped = between * width if model.dropout else 0
    entry = w * between * width
    whole = 2 * (norm + read + dropped) + attention + mlp
    kept = {"none": whole, "selective": entry + attention_products + mlp_products + 2 * read, "full": entry}
    if split.chunk_bytes:  # forward leaves the gradients of what the head reads and of its weight
        last, loss = norm + read + 4 * vocabulary * width, min(tokens * vocabulary * w, split.chunk_bytes) + 8 * tokens
        if w < 4 and not split.on_gpu:  # a chunk in fp32 too, for the weight's gradient
            loss = 3 * loss
        if split.on_gpu and vocabulary * w % 16:  # the weight with rows of zeros behind it
            loss += w * vocabulary * width
    else:
        # over tensor ranks the logits as they are and a number a token, else their logarithmic softmax in fp32
        last = norm + read + tokens * (w * vocabulary + 12 if split.tp > 1 else 4 * vocabulary + 8)
        loss = tokens * (24 if split.tp > 1 else vocabulary * (4 + (w if w < 4 else 0)))
    return Activations(
        block=kept[recompute],
        first=8 * tokens + dropped,
        last=last,
        recomputed=0 if recompute == "none" else whole,
        message=entry,
        loss=loss,
    )


def _norm(size: int, w: int, kind: str) -> int:
    """A norm over `size` numbers. RMSNorm: its input in fp32, one number of scale, the normalised value; LayerNorm: its
    input and two numbers."""
    return (4 + w) * size + 4 if kind == "rmsnorm" else w * size + 2 * w


def _attention(model: ModelConfig, split: Split, tokens: int, length: int, w: int) -> tuple[int, int]:
    """From the projections of query, key and value to the input of the output projection; and of that the results of
    matrix products and of attention, which selective recompute keeps."""
    heads, kv_heads = model.num_heads // split.tp, model.kv_heads // split.tp
    queries, keys = heads * model.head_dim, kv_heads * model.head_dim
    is_ring = split.cp > 1 and split.cp_kind == "ring"
    result = (4 if is_ring else w) * queries + 4 * heads  # with the log-sum-exp of each row
    # rotated and exchanged queries lie head by head, as does attention's result: the projection reads a copy by tokens
    copied = w * queries if model.position == "rope" or split.cp > 1 else 0
    products = tokens * (w * (queries + 2 * keys) + result)
    whole = products + tokens * copied
    if model.position == "rope":  # cosines and sines, each block its own
        whole += 4 * model.head_dim * length
    if model.qk_norm:
        whole += tokens * (heads + kv_heads) * _norm(model.head_dim, w, "rmsnorm")
    return whole, products


def _mlp(model: ModelConfig, split: Split, tokens: int, w: int) -> tuple[int, int]:
    """Inside the feed-forward layer; and of that the results of matrix products."""
    size = w * tokens * model.ffn_dim // split.tp
    # gate, silu(gate), up and their product; or GELU's input and its result
    return (4 * size, 2 * size) if model.activation == "swiglu" else (2 * size, size)

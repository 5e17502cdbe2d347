"""Bytes of activations, by arithmetic from a job's sizes: what the model of model/gpt.py keeps for the backward pass.

Counts what autograd keeps, tensor by tensor, on one rank and for one micro-batch (after Korthikanti et al., 2022,
arXiv:2205.05198, section 4). Unlike theirs, this model has fused attention, so nothing grows with the square of the
sequence length; norms keep an fp32 copy of their input; the loss works in fp32. Fused kernels keep less with RMSNorm
and SwiGLU, so for those the result is an upper bound. Where attention takes a dense mask, that alone grows with the
square; it is counted. Dropout inside attention is not, because its memory depends on the kernel. Imports no torch.

`w` is the number of bytes of the compute format.
"""

from __future__ import annotations

from typing import NamedTuple

from megatrain.config import ModelConfig
from megatrain.kernels import SCORE_TILE_BYTES, SHORT_DOCUMENT
from megatrain.model.formats import FORMAT_BYTES
from megatrain.parallel import plan


class Activations(NamedTuple):
    """Bytes that one micro-batch leaves on one rank.

    `block` is kept by each block, `first` by the embedding, `last` by the final norm, the head and the loss, and `mask`
    by each stage. `backward` exists only during one block's backward pass: what is recomputed, and ring attention's
    buffers. `message` is the activation sent between two pipeline stages. `loss` is the loss's working memory beyond
    what it keeps.
    """

    block: int
    first: int
    last: int
    mask: int
    backward: int
    message: int
    loss: int


class Split(NamedTuple):
    """The properties of a layout that determine the size of activations."""

    engine: str
    tp: int
    cp: int
    cp_kind: str
    chunk_bytes: int
    """Bytes of logits in a chunk, where head and loss are computed in chunks; else 0."""
    on_gpu: bool
    masks: int = 0
    """Number of dense masks over the whole sequence that a micro-batch needs: none, one, or one a row."""
    by_document: bool = False
    """Whether attention takes rows document by document, without a mask (kernels/attention.py)."""
    own_positions: bool = False
    """Whether each row has positions of its own."""


def count(
    model: ModelConfig, split: Split, precision: str, recompute: str, micro_batch_size: int, seq_len: int
) -> Activations:
    """Return the activations of a job on one rank; tensor ranks with a smaller vocabulary block hold a little less."""
    w, width = FORMAT_BYTES[precision], model.hidden_size
    tokens = micro_batch_size * seq_len // split.cp
    # Between layers the native engine cuts the sequence over tensor ranks; DeepSpeed's AutoTP keeps it whole.
    between = tokens // split.tp if split.engine == "native" else tokens
    vocabulary = plan.chunk(model.vocab, split.tp, 0)[1]
    norm = between * _norm(width, w, model.norm)
    # A layer's input, gathered over tensor ranks, and equally its output before it is scattered.
    read = w * tokens * width
    attention, attention_products = _attention(model, split, tokens, seq_len // split.cp, w)
    mlp, mlp_products = _mlp(model, split, tokens, w)
    dropped = between * width if model.dropout else 0
    entry = w * between * width
    whole = 2 * (norm + read + dropped) + attention + mlp
    kept = {"none": whole, "selective": entry + attention_products + mlp_products + 2 * read, "full": entry}
    if split.chunk_bytes:  # forward leaves the gradients of the head's input and of its weight
        last, loss = norm + read + 4 * vocabulary * width, min(tokens * vocabulary * w, split.chunk_bytes) + 8 * tokens
        if w < 4 and not split.on_gpu:  # a chunk in fp32 too, for the weight's gradient
            loss = 3 * loss
        if split.on_gpu and vocabulary * w % 16:  # the weight with rows of zeros behind it
            loss += w * vocabulary * width
    else:
        # tensor ranks keep the logits and three numbers a token; one rank keeps their log-softmax in fp32
        last = norm + read + tokens * (w * vocabulary + 12 if split.tp > 1 else 4 * vocabulary + 8)
        loss = tokens * (24 if split.tp > 1 else vocabulary * (4 + (w if w < 4 else 0)))
    return Activations(
        block=kept[recompute],
        first=8 * tokens + dropped,
        last=last,
        mask=w * split.masks * seq_len**2,
        backward=(0 if recompute == "none" else whole) + _ring(model, split, micro_batch_size, seq_len, w),
        message=entry,
        loss=loss,
    )


def _norm(size: int, w: int, kind: str) -> int:
    """Return the bytes that a norm over `size` numbers keeps.

    RMSNorm: its input in fp32, one scale, the normalised value. LayerNorm: its input, mean and inverse deviation.
    """
    return (4 + w) * size + 4 if kind == "rmsnorm" else w * size + 2 * w


def _attention(model: ModelConfig, split: Split, tokens: int, length: int, w: int) -> tuple[int, int]:
    """Return the bytes kept from the q, k and v projections to the input of the output projection: all, and selective.

    Selective recompute keeps the results of matrix products and of attention.
    """
    heads, kv_heads = model.num_heads // split.tp, model.kv_heads // split.tp
    queries, keys = heads * model.head_dim, kv_heads * model.head_dim
    is_ring = split.cp > 1 and split.cp_kind == "ring"
    result = (4 if is_ring else w) * queries + 4 * heads  # with the log-sum-exp of each row
    # with RoPE or context parallelism, attention's result is heads first; the output projection copies it tokens first
    copied = w * queries if model.position == "rope" or split.cp > 1 else 0
    products = tokens * (w * (queries + 2 * keys) + result)
    whole = products + tokens * copied
    if split.by_document:
        more, more_products = _by_document(split, tokens, length * split.cp, queries, keys, w)
        whole, products = whole - tokens * copied + more, products + more_products
    if split.masks and not is_ring:  # with a mask, torch's kernels need a key and a value for each query head
        whole += tokens * 2 * w * (queries - keys)
    if model.position == "rope":  # each block computes its own cosines and sines
        whole += 4 * model.head_dim * (tokens if split.own_positions else length)
    if model.qk_norm:
        each = (queries, keys) if model.qk_norm_over == "heads" else (heads + kv_heads) * (model.head_dim,)
        whole += tokens * sum(_norm(size, w, "rmsnorm") for size in each)
    return whole, products


def _by_document(split: Split, tokens: int, seq_len: int, queries: int, keys: int, w: int) -> tuple[int, int]:
    """Return what attention by document keeps beyond queries, keys, values and its result: all, and selective.

    `queries` and `keys` are the widths of a token's queries and keys.
    """
    exchanged = w * queries * tokens if split.cp > 1 else 0
    if split.on_gpu:  # torch's kernel needs a key and a value for each query head; its result has tokens before heads
        return exchanged + 2 * w * (queries - keys) * tokens, 0
    joined = exchanged or w * queries * tokens  # the results of all documents, tokens before heads
    if w == 4:
        return joined, 0
    # Short documents are computed from fp32 copies. Below that length, all are short. Above, most is held where all but
    # one are: the long one's queries, keys and values are slices that keep those of the whole batch.
    inputs, short, kept = queries + 2 * keys, tokens, 0
    if seq_len > SHORT_DOCUMENT:
        short, kept = tokens - (SHORT_DOCUMENT + 1) // split.cp, w * inputs * tokens
    in_fp32 = 4 * inputs * short + kept - w * inputs * tokens
    results = (4 - w) * queries * short
    return joined + in_fp32 + results, results


def _ring(model: ModelConfig, split: Split, micro_batch_size: int, seq_len: int, w: int) -> int:
    """Return the bytes of ring attention's buffers at the peak of its backward pass (parallel/context.py).

    Counts torch's kernel on a CPU. Its kernel on a GPU, for bf16 and fp16, keeps those formats and holds less.
    """
    if split.cp == 1 or split.cp_kind != "ring":
        return 0
    heads, tokens = model.num_heads // split.tp, micro_batch_size * seq_len // split.cp
    queries, keys = heads * model.head_dim, model.kv_heads // split.tp * model.head_dim
    copied = w < 4  # into fp32: the output's gradient, and a block's queries, keys and values
    travelling = tokens * (2 * w * keys + 8 * keys)  # keys and values, and their gradients in fp32
    held = tokens * 4 * queries * (2 if copied else 1) + travelling
    # A block has half of a rank's tokens: copies of output and gradient, the three gradients, and copies of the inputs.
    repeated = 8 * queries if copied or keys < queries else 0
    block = tokens * (20 * queries + 4 * queries * copied + repeated + 8 * heads) // 2
    if split.on_gpu and (w == 4 or split.masks):  # no fused kernel: tiles of scores, probabilities and their gradients
        block += 3 * SCORE_TILE_BYTES
    elif copied:
        block += 4 * split.masks * (seq_len // (2 * split.cp)) ** 2
    return held + max(block, travelling)  # while a turn's keys and values are sent, the next turn's are received


def _mlp(model: ModelConfig, split: Split, tokens: int, w: int) -> tuple[int, int]:
    """Return the bytes kept inside the feed-forward layer: all, and those of its matrix products' results."""
    size = w * tokens * model.ffn_dim // split.tp
    # gate, its activation, up and their product; or GELU's input and its result
    return (4 * size, 2 * size) if model.gated else (2 * size, size)

"""What attention by document keeps for the backward pass: by hand, and summed from the tensors that it saves."""

import pytest
import torch

from megatrain.config import ModelConfig, TrainConfig
from megatrain.kernels import attention as kernel
from megatrain.kernels.attention import Documents
from megatrain.kernels.choice import REFERENCE
from megatrain.model.gpt import Attention
from megatrain.parallel.layout import Layout
from megatrain.planner import activations
from megatrain.planner.memory import MemoryModel

Q, K = 64, 16  # widths of 8 query heads and 2 key-value heads of 8


def model(position="rope", kv_heads=2):
    return ModelConfig(num_heads=8, num_kv_heads=kv_heads, hidden_size=Q, position=position, max_seq_len=2048)


def counted(config, w, tokens, seq_len, **split):
    """Return the formula's bytes per token: all that attention keeps, and what selective recompute keeps."""
    layout = activations.Split("native", split.pop("tp", 1), split.pop("cp", 1), "ulysses", 0, **split)
    found = activations._attention(config, layout, tokens, seq_len // layout.cp, w)
    return tuple(size / tokens for size in found)


ANGLES, LSE = 4 * 8, 4 * 8  # the cosines and sines of a head, fp32; a log-sum-exp for each query head, fp32


@pytest.mark.parametrize(
    ("split", "w", "seq_len", "whole", "selective"),
    [
        # q, k and v, the result and its log-sum-exp; without documents also the result with tokens first
        ({"on_gpu": True}, 2, 1024, 2 * (Q + 2 * K + Q + Q) + LSE, 2 * (Q + 2 * K + Q) + LSE),
        # on a GPU: q, k and v of every query head, the result
        ({"on_gpu": True, "by_document": True}, 2, 1024, 2 * (Q + 2 * Q + Q) + LSE, 2 * (Q + 2 * K + Q) + LSE),
        ({"on_gpu": True, "by_document": True, "tp": 2}, 2, 1024, Q + 2 * Q + Q + LSE / 2, Q + 2 * K + Q + LSE / 2),
        ({"on_gpu": True, "by_document": True, "cp": 2}, 2, 1024, 2 * (4 * Q + Q) + LSE, 2 * (Q + 2 * K + Q) + LSE),
        # on a CPU in fp32: the results of the documents, and those joined
        ({"on_gpu": False, "by_document": True}, 4, 1024, 4 * (Q + 2 * K + 2 * Q) + LSE, 4 * (2 * Q + 2 * K) + LSE),
        # in bf16 short documents: q, k, v and result in fp32; the joined result in bf16
        (
            {"on_gpu": False, "by_document": True}, 2, 512,
            4 * (2 * Q + 2 * K) + 2 * Q + LSE,
            2 * (Q + 2 * K) + 4 * Q + LSE,
        ),
        # of 1026 tokens 513 in one document: half of the fp32 copies, and the bf16 ones of all
        (
            {"on_gpu": False, "by_document": True}, 2, 1026,
            2 * (Q + 2 * K) + 4 * (Q + 2 * K) / 2 + 4 * Q / 2 + 2 * Q / 2 + 2 * Q + LSE,
            2 * (Q + 2 * K) + 4 * Q / 2 + 2 * Q / 2 + LSE,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_bytes_per_token_are_those_worked_out_by_hand(split, w, seq_len, whole, selective):
    assert counted(model(), w, seq_len // split.get("cp", 1), seq_len, **split) == (whole + ANGLES, selective)


def saved(config, dtype, documents, attend=None, positions=None):
    """Return the bytes per token that an attention layer's tensors keep, beside its input and its weights."""
    layer = Attention(config, REFERENCE).to(dtype)
    if attend:
        layer.attend = attend
    x = torch.randn(len(documents), sum(documents[0]), Q, dtype=dtype)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, torch.arange(x.shape[1]) if positions is None else positions, Documents(documents), None)
    return sum(sizes.values()) / x[..., 0].numel()


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(
    ("dtype", "documents"),
    [
        (torch.float32, [[300, 724]]),
        (torch.bfloat16, [[100, 412], [256, 256]]),
        (torch.bfloat16, [[513, 511]]),
        (torch.bfloat16, [[513, 11], [500, 24]]),
    ],
    ids=str,
)
def test_a_cpu_keeps_what_the_formula_says(position, kv_heads, dtype, documents):
    config = model(position, kv_heads)
    rows, length, w = len(documents), sum(documents[0]), dtype.itemsize
    expected, _ = counted(config, w, rows * length, length, on_gpu=False, by_document=True)
    assert saved(config, dtype, documents) == pytest.approx(expected, rel=1e-3)


def test_positions_of_their_own_take_angles_for_each_row():
    rows, length = 3, 1024
    documents = [[600, 424]] * rows
    positions = torch.stack([torch.cat([torch.arange(600), torch.arange(424)])] * rows)
    more = {"on_gpu": False, "by_document": True, "own_positions": True}
    expected, _ = counted(model(), 4, rows * length, length, **more)
    assert saved(model(), torch.float32, documents, positions=positions) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("documents", [[[600, 424]], [[1024 - 600, 600]], [[700, 324], [1000, 24]]], ids=str)
def test_other_lengths_keep_no_more(documents):
    rows, length = len(documents), sum(documents[0])
    most, _ = counted(model(), 2, rows * length, length, on_gpu=False, by_document=True)
    assert 0.5 * most < saved(model(), torch.bfloat16, documents) <= most


class Packed(torch.autograd.Function):
    """Keeps what torch's kernel of many sequences keeps: its inputs, its result and the log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v):
        result = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, result, torch.empty(q.shape[1], q.shape[0]))
        return result

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_the_packed_form_keeps_what_the_formula_says_of_a_gpu(position, kv_heads, monkeypatch):
    """With a stand-in for torch's kernel, which runs on GPUs alone."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v, *_, **__: Packed.apply(q, k, v))
    config = model(position, kv_heads)
    expected, _ = counted(config, 2, 2048, 1024, on_gpu=True, by_document=True)
    documents = [[600, 424], [1000, 24]]
    kept = saved(config, torch.bfloat16, documents, lambda q, k, v, mask, _: kernel._packed(q, k, v, mask))
    assert kept == pytest.approx(expected, rel=1e-3)


def test_an_estimate_of_llama_8b_has_the_repeated_keys_and_values():
    """4096 wide queries, 1024 wide keys: 12,288 bytes more a token and block, less 8,192 that are not copied."""
    config = TrainConfig()
    config.model = ModelConfig(
        num_layers=32, num_heads=32, num_kv_heads=8, hidden_size=4096, ffn_size=14336, vocab_size=128256,
        max_seq_len=8192,
    )  # fmt: skip
    config.precision.name, config.engine.name, config.train.seq_len = "bf16", "native", 8192
    config.train.micro_batch_size = config.train.global_batch_size = 1
    layout, planner = Layout.of(config, 1), MemoryModel(config.model)
    plain = planner.largest(config, layout).activations
    config.train.mask_documents = True
    assert planner.largest(config, layout).activations - plain == 32 * 8192 * (12288 - 8192)

"""Attention within documents: by document or packed it is as under the dense mask, and has no T x T tensor."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from megatrain.config import ModelConfig
from megatrain.kernels import attention as module
from megatrain.kernels.attention import Documents, attends_by_document, attention, document_mask
from megatrain.model.gpt import GPT
from megatrain.model.init import build_model
from megatrain.parallel.recompute import recompute_blocks

torch.set_num_threads(1)

LENGTHS = [
    pytest.param([[37], [37]], id="whole rows"),
    pytest.param([[1] * 37, [36, 1]], id="documents of one token"),
    pytest.param([[5, 1, 13, 18], [17, 3, 1, 16]], id="odd lengths"),
]


def inputs(rows: int, heads: int, kv_heads: int, length: int, size: int, dtype=torch.float64, device="cpu"):
    """Queries, keys and values as the model makes them, tokens before heads in memory; and the output's gradient."""
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> torch.Tensor:
        values = torch.randn(rows, length, number, size, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_()

    leaves = draw(heads), draw(kv_heads), draw(kv_heads)
    return leaves, draw(heads).detach().transpose(1, 2)


def result(attend, leaves, upstream) -> list[torch.Tensor]:
    """The output and the three gradients of `attend(q, k, v)`."""
    y = attend(*(x.transpose(1, 2) for x in leaves))
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def varlen_by_mask(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """What torch documents of its `varlen_attn`, computed with a mask: `[B T, H, K]` in and out."""
    assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
    assert q.shape == k.shape == v.shape and q.dim() == 3
    lengths = cu_seq_q.diff()
    assert max_q == max_k == int(lengths.max()) and int(cu_seq_q[0]) == 0 and int(cu_seq_q[-1]) == len(q)
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)
    seen = (ids[:, None] == ids).tril()
    heads_first = [x.transpose(0, 1) for x in (q, k, v)]
    y = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen)
    return y.transpose(0, 1)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("form", ["one by one", "packed"])
def test_documents_are_attended_to_as_under_the_dense_mask(lengths, kv_heads, form, monkeypatch):
    documents = Documents(lengths)
    leaves, upstream = inputs(2, 4, kv_heads, 37, 6)
    if form == "packed":
        monkeypatch.setattr(varlen, "varlen_attn", varlen_by_mask)
        found = result(lambda *qkv: module._packed(*qkv, documents), leaves, upstream)
    else:
        found = result(lambda *qkv: attention(*qkv, documents), leaves, upstream)
    mask = document_mask(documents.ids(), torch.float64)
    for name, actual, expected in zip(
        "oqkv", found, result(lambda *qkv: attention(*qkv, mask), leaves, upstream), strict=True
    ):
        torch.testing.assert_close(actual, expected, msg=f"{form}: {name}")


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's varlen_attn needs a GPU"),
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "lengths",
    [[[700], [700]], [[1, 63, 64, 65, 507], [350, 350]], [[7] * 100, [699, 1]]],
    ids=["whole rows", "odd lengths", "short"],
)
@pytest.mark.parametrize(("kv_heads", "size"), [(4, 64), (2, 40)])
def test_in_16_bits_documents_are_as_accurate_as_under_the_dense_mask(lengths, kv_heads, size, dtype, device):
    """Both are within two roundings of float64, relative to the largest element."""
    documents = Documents(lengths).to(torch.device(device))
    assert attends_by_document(documents.offsets.device, dtype, size, 0.0)
    leaves, upstream = inputs(2, 4, kv_heads, 700, size, dtype, device)
    ids = documents.ids()
    exact = result(
        lambda *qkv: attention(*qkv, document_mask(ids, torch.float64)),
        [x.detach().double().requires_grad_() for x in leaves],
        upstream.double(),
    )
    dense = result(lambda *qkv: attention(*qkv, document_mask(ids, dtype)), leaves, upstream)
    by_document = result(lambda *qkv: attention(*qkv, documents), leaves, upstream)
    for name, true, masked, found in zip("oqkv", exact, dense, by_document, strict=True):
        assert found.dtype == dtype
        for values in (masked, found):
            error = (values.double() - true).abs().max() / true.abs().max()
            assert error <= 2 * torch.finfo(dtype).eps, name


def test_documents_know_the_document_of_each_token():
    documents = Documents([[2, 3], [1, 1, 3]])
    assert documents.ids().tolist() == [[0, 0, 1, 1, 1], [2, 3, 4, 4, 4]]
    assert documents.offsets.tolist() == [0, 2, 5, 6, 7, 10] and documents.longest == 3


LENGTH = 96


def make_model(**changes) -> GPT:
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "ffn_size": 48, "vocab_size": 61}
    return build_model(ModelConfig(**{**shape, "max_seq_len": LENGTH, "init_std": 0.3, **changes}), seed=1)


def loss_and_gradients(model: GPT, documents: Documents) -> list[torch.Tensor]:
    ids = torch.randint(0, 61, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:], documents=documents)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("needs_dense_mask", [False, True])
@pytest.mark.parametrize("lengths", [[LENGTH], [1, 40, 55]], ids=str)
def test_only_the_dense_mask_has_a_square_of_the_sequence(lengths, needs_dense_mask):
    """Forward and backward: nothing else in this model is as large. One document needs no mask at all."""
    model = make_model()
    model.needs_dense_mask = needs_dense_mask
    with Sizes() as sizes:
        loss_and_gradients(model, Documents([lengths]))
    assert (sizes.largest >= LENGTH**2) == (needs_dense_mask and len(lengths) > 1)


@pytest.mark.parametrize(("window", "is_dense"), [(40, False), (39, True), (8, True)])
def test_a_window_needs_the_dense_mask_only_where_a_document_is_longer(window, is_dense):
    documents = Documents([[40, 17, 39]])
    model, dense = make_model(sliding_window=window), make_model(sliding_window=window)
    dense.needs_dense_mask = True
    with Sizes() as sizes:
        found = loss_and_gradients(model, documents)
    assert (sizes.largest >= LENGTH**2) == is_dense
    torch.testing.assert_close(found, loss_and_gradients(dense, documents), rtol=1e-4, atol=1e-4)


@pytest.fixture
def fresh_compiler():
    """Blocks that other tests compiled do not count, and these do not count for them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batches() -> list[Documents]:
    return [Documents([lengths]) for lengths in ([1, 95], [50, 46], [3, 5, 88], [8] * 12, [1] * 96, [95, 1])]


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_blocks_are_compiled_once_for_all_documents(policy, fresh_compiler):
    """And compute what they compute without a compiler."""
    counter = CompileCounter()
    model, compiled = make_model(), make_model()
    recompute_blocks(compiled.blocks, policy)
    for block in compiled.blocks:
        block.compile(backend=counter)
    num_graphs = []
    for documents in batches():
        found = loss_and_gradients(compiled, documents)
        torch.testing.assert_close(found, loss_and_gradients(model, documents), rtol=1e-4, atol=1e-4)
        num_graphs.append(counter.frame_count)
    assert len(set(num_graphs)) == 1, num_graphs


def test_packed_blocks_are_compiled_whole_and_at_most_three_times(monkeypatch, fresh_compiler):
    """As on a GPU: one operator takes all documents. Later graphs are for any length, and any number of documents."""

    @torch.library.custom_op("megatrain_test::varlen", mutates_args=())
    def by_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
        return varlen_by_mask(q, k, v, ends, ends, longest, longest, window_size=(-1, 0)).contiguous()

    by_mask.register_fake(lambda q, k, v, ends, longest: torch.empty_like(q, memory_format=torch.contiguous_format))
    monkeypatch.setattr(
        varlen, "varlen_attn", lambda q, k, v, ends, _e, longest, _l, window_size: by_mask(q, k, v, ends, longest)
    )
    monkeypatch.setattr(module, "_one_by_one", lambda q, k, v, documents, dropout: module._packed(q, k, v, documents))
    counter = CompileCounter()
    model, compiled = make_model(), make_model()
    for block in compiled.blocks:
        block.compile(backend=counter, fullgraph=True)
    ids = torch.randint(0, 61, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for documents in batches():
            torch.testing.assert_close(compiled(ids, documents=documents), model(ids, documents=documents))
    assert counter.frame_count <= 3

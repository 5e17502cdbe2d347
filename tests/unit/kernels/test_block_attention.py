"""Blocks of attention: fused and in tiles they are float64 softmax attention, and their parts make the whole."""

from __future__ import annotations

import math

import pytest
import torch
from support.peak import peak_bytes

from megatrain.kernels import block_attention as module
from megatrain.kernels.block_attention import block_attention, block_attention_backward, wide

torch.set_num_threads(1)

_ATEN = torch.ops.aten
PATHS = pytest.mark.parametrize("fused", [True, False], ids=["fused", "tiled"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Use tiles of a few rows, of which the last is smaller."""
    monkeypatch.setattr(module, "SCORE_TILE_BYTES", 3000)


def inputs(dtype, heads=4, kv_heads=2, queries=13, keys=13, size=6):
    """Return q, k, v and the gradient of the output, in the layout of the model: heads are the inner dimension."""
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (2, queries, heads, size),
        (2, keys, kv_heads, size),
        (2, keys, kv_heads, size),
        (2, queries, heads, size),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]


def scores(q, k, mask):
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT / math.sqrt(q.shape[-1]) + mask


def expected(q, k, v, d_out, mask):
    """Return softmax attention in float64: output, log-sum-exp and gradients of q, k and v."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    logits = scores(q, k, mask)
    out = logits.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    out.backward(d_out.double())
    return out.detach(), logits.logsumexp(-1).detach(), q.grad, k.grad, v.grad


def causal_mask(length):
    return torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill_(
        ~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf
    )


def check(found, true, dtype):
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for name, one, other in zip(("out", "logsumexp", "d_q", "d_k", "d_v"), found, true, strict=True):
        assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        torch.testing.assert_close(one.double(), other, rtol=limit, atol=limit, msg=lambda text, name=name: name + text)


@PATHS
@DTYPES
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(13, 13, True), (13, 13, False), (5, 31, False), (1, 1, True)])
def test_a_block_is_softmax_attention(fused, dtype, kv_heads, queries, keys, causal):
    """On and off the diagonal, with grouped heads and odd sizes. The arithmetic of bf16 inputs is fp32."""
    q, k, v, d_out = inputs(dtype, kv_heads=kv_heads, queries=queries, keys=keys)
    out, logsumexp = block_attention(q, k, v, None, causal, fused)
    gradients = block_attention_backward(d_out, q, k, v, out, logsumexp, None, causal, fused)
    mask = causal_mask(queries) if causal else torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    check((out, logsumexp, *gradients), expected(q, k, v, d_out, mask), dtype)


@PATHS
@DTYPES
def test_blocks_with_wholly_masked_rows_make_the_whole(fused, dtype):
    """Two blocks of keys, each hidden from some queries; a part of the gradients comes from the merged output."""
    q, k, v, d_out = inputs(dtype, queries=9, keys=14)
    mask = torch.zeros(2, 1, 9, 14, dtype=dtype)
    mask[:, :, :4, 7:] = -torch.inf
    mask[0, :, 3:6, :7] = mask[:, :, 8, 2:9] = -torch.inf
    mask[0, :, 3] = 0
    true = expected(q, k, v, d_out, mask.double())
    blocks = [(k[:, :, half], v[:, :, half], mask[..., half]) for half in (slice(7), slice(7, 14))]
    parts = [block_attention(q, *block, False, fused) for block in blocks]
    hidden = blocks[0][2].amax(-1).expand(2, 4, 9) == -torch.inf
    assert hidden.any()
    assert torch.equal(parts[0][1] == -torch.inf, hidden) and not parts[0][0][hidden].any()
    logsumexp = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * (part_logsumexp - logsumexp).exp()[..., None] for part, part_logsumexp in parts)
    gradients = [
        block_attention_backward(d_out, q, *block[:2], out, logsumexp, block[2], False, fused) for block in blocks
    ]
    (d_q, d_k, d_v), (d_q2, d_k2, d_v2) = gradients
    found = out, logsumexp, d_q + d_q2, torch.cat([d_k, d_k2], dim=2), torch.cat([d_v, d_v2], dim=2)
    check(found, true, dtype)


@PATHS
def test_any_layout_in_memory_is_read_rightly(fused):
    """Torch's kernel on a CPU takes the numbers of a head to be neighbours and does not check it."""
    tensors = inputs(torch.float64)
    strided = [x.mT.contiguous().mT for x in tensors]
    assert strided[0].stride(-1) != 1
    results = []
    for q, k, v, d_out in (tensors, strided):
        out, logsumexp = block_attention(q, k, v, None, True, fused)
        results.append([out, *block_attention_backward(d_out, q, k, v, out, logsumexp, None, True, fused)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


HAS_FLASH = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


class FlashOnACPU:
    """Torch's two operators of flash attention on a GPU, with their schemas, computed on a CPU."""

    @staticmethod
    def _scaled_dot_product_flash_attention(q, k, v, dropout, causal):
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and dropout == 0.0
        _ATEN._scaled_dot_product_flash_attention(*(x.to("meta") for x in (q, k, v)), dropout, causal)
        out, logsumexp = _ATEN._scaled_dot_product_flash_attention_for_cpu(*map(wide, (q, k, v)), 0.0, causal)
        return out.bfloat16(), logsumexp, None, None, 0, 0, None, None, None

    @staticmethod
    def _scaled_dot_product_flash_attention_backward(*arguments):
        on_meta = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments)
        shapes = [x.shape for x in _ATEN._scaled_dot_product_flash_attention_backward(*on_meta)]
        d_out, q, k, v, out, logsumexp, *_, dropout, causal, _, _ = arguments
        assert {x.dtype for x in (d_out, q, k, v, out)} == {torch.bfloat16} and logsumexp.is_contiguous()
        gradients = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *(wide(x) for x in (d_out, q, k, v, out, logsumexp)), dropout, causal
        )
        assert [x.shape for x in gradients] == shapes
        return [x.bfloat16() for x in gradients]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "device", ["stand-in", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_FLASH, reason="needs a GPU"))]
)
def test_flash_attention_on_a_gpu_is_softmax_attention(device, causal, monkeypatch):
    """In bf16, from grouped heads and a merged output in fp32. Without a GPU a stand-in checks how it is called."""
    if device == "stand-in":
        monkeypatch.setattr(module, "_flash_applies", lambda *_: True)
        monkeypatch.setattr(module, "_ATEN", FlashOnACPU)
    where = "cpu" if device == "stand-in" else device
    q, k, v, d_out = (x.to(where) for x in inputs(torch.bfloat16, queries=32, keys=32, size=8))
    assert module._flash_applies(q, None, causal)
    out, logsumexp = block_attention(q, k, v, None, causal)
    gradients = block_attention_backward(d_out.float(), q, k, v, out, logsumexp, None, causal)
    mask = causal_mask(32) if causal else torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    true = expected(q.cpu(), k.cpu(), v.cpu(), d_out.cpu(), mask)
    for name, one, other in zip(
        ("out", "logsumexp", "d_q", "d_k", "d_v"), (out, logsumexp, *gradients), true, strict=True
    ):
        assert one.dtype == torch.float32, name
        torch.testing.assert_close(one.cpu().double(), other, rtol=0.03, atol=0.03, msg=name)


def test_tiles_bound_the_memory(monkeypatch):
    """Beside the results there are three tiles and the causal mask of one, however many tiles there are."""
    tile = 2**19
    monkeypatch.setattr(module, "SCORE_TILE_BYTES", tile)
    q, k, v, d_out = (x.contiguous() for x in inputs(torch.float32, kv_heads=4, queries=1024, keys=1024))
    out, logsumexp = block_attention(q, k, v, None, True, fused=False)
    forward = peak_bytes(lambda: block_attention(q, k, v, None, True, False))
    backward = peak_bytes(lambda: block_attention_backward(d_out, q, k, v, out, logsumexp, None, True, False))
    scores = 2 * 4 * 1024 * 1024 * 4
    assert scores == 64 * tile
    assert forward - out.nbytes - logsumexp.nbytes < 3.5 * tile
    assert backward - 3 * q.nbytes < 3.5 * tile

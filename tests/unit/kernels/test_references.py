"""The reference kernels: their values against independent definitions, their documented gradients against autograd."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.attention import attention, document_mask
from megatrain.kernels.cross_entropy import cross_entropy_sum
from megatrain.kernels.gelu import gelu
from megatrain.kernels.layer_norm import layer_norm
from megatrain.kernels.rms_norm import rms_norm
from megatrain.kernels.rope import apply_rope, rope_angles
from megatrain.kernels.swiglu import swiglu

torch.set_num_threads(1)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def gradients(output: torch.Tensor, inputs: list[torch.Tensor], g: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(output, inputs, g))


def test_rms_norm_follows_its_formula_and_its_documented_gradient():
    x, weight, g = randn(3, 5, 8).requires_grad_(), randn(8).requires_grad_(), randn(3, 5, 8, seed=1)
    y = rms_norm(x, weight, 1e-3)
    r = (x.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt()
    n = x * r
    torch.testing.assert_close(y, n * weight)
    d_x, d_weight = gradients(y, [x, weight], g)
    torch.testing.assert_close(d_weight, (g * n).sum((0, 1)))
    torch.testing.assert_close(d_x, r * (g * weight - n * (g * weight * n).mean(-1, keepdim=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_rounds_as_llama_does(dtype):
    """Bit-equal to transformers in the 16-bit formats, and within one rounding of it in fp32."""
    theirs = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    theirs.weight.data.copy_(randn(64))
    x = randn(7, 64).to(dtype)
    tolerance = 3e-7 if dtype == torch.float32 else 0
    torch.testing.assert_close(rms_norm(x, theirs.weight, 1e-5), theirs(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm_follows_its_formula_and_its_documented_gradient(with_bias):
    x, weight, g = randn(3, 5, 8).requires_grad_(), randn(8).requires_grad_(), randn(3, 5, 8, seed=1)
    bias = randn(8, seed=2).requires_grad_() if with_bias else None
    y = layer_norm(x, weight, bias, 1e-3)
    r = (x.var(-1, unbiased=False, keepdim=True) + 1e-3).rsqrt()
    n = (x - x.mean(-1, keepdim=True)) * r
    torch.testing.assert_close(y, n * weight + (0 if bias is None else bias))
    d_x, d_weight = gradients(y, [x, weight], g)
    h = g * weight
    torch.testing.assert_close(d_weight, (g * n).sum((0, 1)))
    torch.testing.assert_close(d_x, r * (h - h.mean(-1, keepdim=True) - n * (h * n).mean(-1, keepdim=True)))
    if bias is not None:
        torch.testing.assert_close(gradients(layer_norm(x, weight, bias, 1e-3), [bias], g)[0], g.sum((0, 1)))


def test_layer_norm_takes_its_statistics_in_fp32():
    """A large mean in bf16 would leave nothing of the variance if it were accumulated in bf16."""
    x = (randn(4, 256, dtype=torch.float32) + 64).bfloat16()
    ones = torch.ones(256, dtype=torch.bfloat16)
    expected = layer_norm(x.float(), ones.float(), None, 1e-5).bfloat16()
    torch.testing.assert_close(layer_norm(x, ones, None, 1e-5), expected, rtol=8e-3, atol=8e-3)


def test_rope_is_the_rotation_of_hugging_face():
    q, k = randn(2, 4, 9, 16, dtype=torch.float32), randn(2, 2, 9, 16, dtype=torch.float32)
    cos, sin = rope_angles(torch.arange(3, 12), 16, 10000.0)
    full_cos, full_sin = (torch.cat((a, a), -1).expand(2, -1, -1) for a in (cos, sin))
    their_q, their_k = apply_rotary_pos_emb(q, k, full_cos, full_sin)
    torch.testing.assert_close(apply_rope(q, cos, sin), their_q)
    torch.testing.assert_close(apply_rope(k, cos, sin), their_k)


def test_rope_scores_depend_on_the_distance_of_positions_alone():
    q, k = randn(1, 1, 1, 32, dtype=torch.float32), randn(1, 1, 1, 32, seed=1, dtype=torch.float32)

    def score(m: int, n: int) -> float:
        turned = [apply_rope(x, *rope_angles(torch.tensor([p]), 32, 500.0)) for x, p in ((q, m), (k, n))]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 4) == pytest.approx(score(103, 100), abs=1e-4)
    assert score(7, 4) != pytest.approx(score(8, 4), abs=1e-2)


def test_the_gradient_of_rope_is_the_rotation_back():
    x = randn(2, 3, 5, 8, dtype=torch.float32).requires_grad_()
    g = randn(2, 3, 5, 8, seed=1, dtype=torch.float32)
    cos, sin = rope_angles(torch.arange(5), 8, 100.0)
    torch.testing.assert_close(gradients(apply_rope(x, cos, sin), [x], g)[0], apply_rope(g, cos, -sin))


def test_rope_turns_bf16_in_fp32():
    x = randn(1, 1, 400, 8).bfloat16()
    cos, sin = rope_angles(torch.arange(400), 8, 10000.0)
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).bfloat16())


def test_swiglu_follows_its_formula_and_its_documented_gradient():
    gate, up, g = randn(4, 6).requires_grad_(), randn(4, 6, seed=1).requires_grad_(), randn(4, 6, seed=2)
    s = 1 / (1 + torch.exp(-gate))
    y = swiglu(gate, up)
    torch.testing.assert_close(y, gate * s * up)
    d_gate, d_up = gradients(y, [gate, up], g)
    torch.testing.assert_close(d_up, g * gate * s)
    torch.testing.assert_close(d_gate, g * up * s * (1 + gate * (1 - s)))


def test_gelu_follows_its_formula_and_its_documented_gradient():
    x, g = randn(4, 6).requires_grad_(), randn(4, 6, seed=2)
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    y = gelu(x)
    torch.testing.assert_close(y, 0.5 * x * (1 + t))
    d_x = g * (0.5 * (1 + t) + 0.5 * x * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2))
    torch.testing.assert_close(gradients(y, [x], g)[0], d_x)


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_sums_the_valid_labels_and_has_its_documented_gradient(weighted):
    logits = randn(2, 5, 11, dtype=torch.float32).requires_grad_()
    labels = torch.tensor([[1, 2, IGNORE_INDEX, 10, 0], [IGNORE_INDEX, 3, 3, IGNORE_INDEX, 7]])
    weights = randn(2, 5, dtype=torch.float32).abs() if weighted else None
    p, w = logits.softmax(-1), torch.ones(2, 5) if weights is None else weights
    valid = labels != IGNORE_INDEX
    picked = torch.stack([-p[b, t, labels[b, t]].log() * w[b, t] for b, t in valid.nonzero().tolist()])
    total = cross_entropy_sum(logits, labels, weights)
    torch.testing.assert_close(total, picked.sum())
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), 11)
    expected = (w * valid).unsqueeze(-1) * (p - onehot)
    torch.testing.assert_close(gradients(total, [logits], torch.tensor(1.0))[0], expected)


def test_cross_entropy_is_computed_in_fp32_and_is_zero_without_labels():
    logits = (randn(4, 9) * 8).bfloat16()
    labels = torch.tensor([0, 1, 2, 3])
    assert torch.equal(cross_entropy_sum(logits, labels), cross_entropy_sum(logits.float(), labels))
    assert cross_entropy_sum(logits, labels).dtype == torch.float32
    assert cross_entropy_sum(logits, torch.full((4,), IGNORE_INDEX)).item() == 0.0


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_causal_softmax_with_shared_key_value_heads(kv_heads):
    q, k, v = randn(2, 4, 7, 8), randn(2, kv_heads, 7, 8, seed=1), randn(2, kv_heads, 7, 8, seed=2)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v), naive_attention(q, k, v, causal))
    last = naive_attention(q[:, :, -1:], k, v, causal[-1:])
    torch.testing.assert_close(attention(q[:, :, -1:], k, v), last)


def test_attention_has_its_documented_gradient():
    q, k, v = (randn(1, 2, 5, 4, seed=i).requires_grad_() for i in range(3))
    g = randn(1, 2, 5, 4, seed=9)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    p = (q @ k.transpose(-1, -2) / 2).masked_fill(~causal, -torch.inf).softmax(-1)
    d_p = g @ v.transpose(-1, -2)
    d_s = p * (d_p - (d_p * p).sum(-1, keepdim=True))
    d_q, d_k, d_v = gradients(attention(q, k, v), [q, k, v], g)
    torch.testing.assert_close(d_v, p.transpose(-1, -2) @ g)
    torch.testing.assert_close(d_q, d_s @ k / 2)
    torch.testing.assert_close(d_k, d_s.transpose(-1, -2) @ q / 2)


def test_a_document_mask_keeps_documents_apart():
    ids = torch.tensor([[4, 4, 9, 9, 9], [1, 2, 2, 1, 1]], dtype=torch.int32)
    mask = document_mask(ids, torch.bfloat16)
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bfloat16
    for b, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(5)).tolist():
        seen = row >= column and ids[b, row] == ids[b, column]
        assert mask[b, 0, row, column] == (0 if seen else -torch.inf)


def test_attention_drops_only_what_it_is_told_to():
    q, k, v = (randn(1, 2, 16, 4, seed=i) for i in range(3))
    torch.manual_seed(0)
    assert torch.equal(attention(q, k, v), attention(q, k, v))
    assert not torch.equal(attention(q, k, v, dropout=0.5), attention(q, k, v))

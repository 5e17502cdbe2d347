"""The GPT as a function: what may influence what, and that every way of running it computes the same."""

import pytest
import torch
from torch import nn

from megatrain.config import ModelConfig
from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.attention import Documents
from megatrain.model.cache import KVCache
from megatrain.model.gpt import GPT, mix_seed
from megatrain.model.init import build_model

torch.set_num_threads(1)

GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True, "tie_embeddings": True}
LLAMA = {"num_kv_heads": 2}
QK_NORM = {"num_kv_heads": 1, "qk_norm": True, "tie_embeddings": True}
WINDOWED = {
    "num_kv_heads": 2,
    "sliding_window": 7,
    "attention_bias": "qkv",
    "rope_scaling": "dynamic",
    "rope_factor": 2.0,
}
OLMO2 = {
    "norm_place": "after",
    "qk_norm": True,
    "qk_norm_over": "heads",
    "rope_scaling": "yarn",
    "rope_factor": 4.0,
    "rope_original_seq_len": 8,
}
GEMMA = {"activation": "geglu", "embedding_scale": 5.5, "tie_embeddings": True, "num_kv_heads": 1, "head_size": 6}
FAMILIES = pytest.mark.parametrize(
    "family",
    [GPT2, LLAMA, QK_NORM, WINDOWED, OLMO2, GEMMA],
    ids=["gpt2", "llama", "qk_norm", "windowed", "olmo2", "gemma"],
)


def make_config(family: dict, **changes) -> ModelConfig:
    shape = {"num_layers": 3, "num_heads": 4, "hidden_size": 32, "ffn_size": 48, "vocab_size": 61, "max_seq_len": 32}
    return ModelConfig(**{**shape, "init_std": 0.3, **family, **changes})


def batch(rows: int = 2, length: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 61, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def loss_and_gradients(model: GPT, **arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(*batch(), **arguments)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_bit_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@FAMILIES
def test_a_token_influences_itself_and_what_follows_and_nothing_before(family):
    model, (tokens, _) = build_model(make_config(family), seed=1), batch()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 61
    difference = (model(tokens) - model(changed)).abs().amax((0, 2))
    assert torch.equal(difference[:5], torch.zeros(5))
    assert (difference[5:] > 1e-4).all()


def test_a_token_sees_no_further_back_than_the_window():
    """One layer: token 2 reaches tokens 2 to 5 through a window of 4, packed or not, and through a cache."""
    config = make_config(LLAMA, num_layers=1, sliding_window=4)
    model, (tokens, _) = build_model(config, seed=1), batch()
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 61

    def in_pieces(tokens: torch.Tensor) -> torch.Tensor:
        cache = KVCache(config, 2, 12, tokens.device, torch.float32)
        return torch.cat([model(piece, cache=cache) for piece in tokens.split([3, 1, 4, 4], dim=1)], 1)

    for run in (model, lambda x: model(x, documents=Documents([[12], [12]])), in_pieces):
        with torch.no_grad():
            seen = (run(tokens) - run(changed)).abs().amax((0, 2)) > 1e-6
        assert seen.tolist() == [False] * 2 + [True] * 4 + [False] * 6


def test_a_window_as_long_as_the_sequence_changes_nothing():
    tokens, _ = batch()
    plain, wide = (build_model(make_config(LLAMA, sliding_window=window), seed=1) for window in (None, 12))
    assert torch.equal(plain(tokens), wide(tokens))


@FAMILIES
def test_the_loss_is_the_weighted_sum_over_labels_that_count(family):
    model, (tokens, labels) = build_model(make_config(family), seed=1), batch()
    labels[0, 3:7] = IGNORE_INDEX
    weights = torch.rand(labels.shape)
    losses = nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(model(tokens, labels), losses.sum())
    torch.testing.assert_close(model(tokens, labels, loss_weights=weights), (losses * weights.flatten()).sum())


@FAMILIES
def test_packed_documents_with_their_own_positions_are_computed_as_if_alone(family):
    model, (tokens, _) = build_model(make_config(family), seed=1), batch()
    positions = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    packed = model(tokens, documents=Documents([[5, 7], [8, 4]]), positions=positions)
    for row, cut in ((0, 5), (1, 8)):
        alone = torch.cat([model(tokens[row : row + 1, :cut]), model(tokens[row : row + 1, cut:])], 1)[0]
        torch.testing.assert_close(packed[row], alone)
    assert not torch.allclose(model(tokens, positions=positions), packed)


@FAMILIES
def test_a_sequence_fed_in_pieces_through_the_cache_gives_the_same_logits(family):
    model, (tokens, _) = build_model(make_config(family), seed=1), batch()
    cache = KVCache(model.config, 2, 12, tokens.device, torch.float32)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split([5, 1, 4, 1, 1], dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-5, atol=1e-4)


@FAMILIES
def test_blocks_compile_whole_and_compute_the_same(family):
    """`fullgraph` refuses graph breaks."""
    model = build_model(make_config(family), seed=1)
    plain = loss_and_gradients(model)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    loss, gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, plain[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_dropout_masks_are_a_function_of_the_seed_and_the_layer():
    model, (tokens, labels) = build_model(make_config(LLAMA, dropout=0.3), seed=1), batch()
    torch.manual_seed(0)
    first = model(tokens, labels, dropout_seed=5)
    torch.manual_seed(99)
    assert torch.equal(first, model(tokens, labels, dropout_seed=5))
    assert not torch.equal(first, model(tokens, labels, dropout_seed=6))
    masks = []
    for layer in (0, 1):
        torch.manual_seed(mix_seed(5, layer))
        masks.append(nn.functional.dropout(torch.ones(64), 0.3))
    assert not torch.equal(*masks)


def test_layers_draw_masks_of_their_own_whatever_the_layers_before_them_drew():
    """Skipping a block leaves the masks of the next one as they were: a pipeline's stages agree with one process."""
    model, (tokens, _) = build_model(make_config(LLAMA, dropout=0.3), seed=1), batch()
    states = []
    model.blocks[2].register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    model(tokens, dropout_seed=5)
    model.blocks[1].forward = lambda x, *_: x
    model(tokens, dropout_seed=5)
    assert torch.equal(*states)


def test_dropout_touches_embeddings_attention_and_both_branches_in_training_only(monkeypatch):
    seen = []
    real = nn.functional.dropout
    monkeypatch.setattr(nn.functional, "dropout", lambda x, p, on: (seen.append((p, on)), real(x, p, on))[1])
    attention_rates = []
    real_attention = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *a, dropout_p, **k: (attention_rates.append(dropout_p), real_attention(*a, dropout_p=dropout_p, **k))[1],
    )
    model, (tokens, _) = build_model(make_config(LLAMA, dropout=0.3), seed=1), batch()
    model(tokens, dropout_seed=1)
    assert seen == [(0.3, True)] * 7 and attention_rates == [0.3] * 3
    seen.clear(), attention_rates.clear()
    model.eval()(tokens)
    assert all(not on for _, on in seen) and attention_rates == [0.0] * 3


def test_training_with_dropout_and_no_seed_is_refused():
    model, (tokens, labels) = build_model(make_config(LLAMA, dropout=0.3), seed=1), batch()
    with pytest.raises(ValueError, match="dropout_seed"):
        model(tokens, labels)
    model.eval()(tokens, labels)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_shard_of_a_block_is_the_same_code(bias, qk_norm):
    """Heads and feed-forward columns cut in two: the two outputs of each branch add up to the whole block's."""
    config = make_config({"bias": bias, "qk_norm": qk_norm, "num_kv_heads": 2})
    whole = build_model(config, seed=1).blocks[0]
    x, positions = torch.randn(2, 6, 32), torch.arange(6)
    attention_parts, mlp_parts = [], []
    for rank in range(2):
        part = build_model(config, seed=1).blocks[0]
        for linear in (part.attn.q, part.attn.k, part.attn.v, part.mlp.gate, part.mlp.up):
            linear.weight = nn.Parameter(linear.weight.chunk(2, 0)[rank])
            if bias:
                linear.bias = nn.Parameter(linear.bias.chunk(2, 0)[rank])
        for linear in (part.attn.o, part.mlp.down):
            linear.weight = nn.Parameter(linear.weight.chunk(2, 1)[rank])
            if rank > 0:  # added once, after the sum
                linear.bias = None
        attention_parts.append(part.attn(x, positions, None, None))
        mlp_parts.append(part.mlp(x))
    torch.testing.assert_close(sum(attention_parts), whole.attn(x, positions, None, None))
    torch.testing.assert_close(sum(mlp_parts), whole.mlp(x))


@FAMILIES
def test_a_model_is_built_without_memory_and_without_buffers(family):
    with torch.device("meta"):
        model = GPT(make_config(family))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    assert model(torch.zeros(1, 4, dtype=torch.long, device="meta")).shape == (1, 4, 61)


def test_building_fills_no_values(monkeypatch):
    """Construction under an engine that partitions parameters must cost nothing: no initialiser is called."""
    for name in ("normal_", "uniform_", "kaiming_uniform_", "ones_", "zeros_"):
        monkeypatch.setattr(nn.init, name, lambda *_, **__: pytest.fail("an initialiser ran"))
    GPT(make_config(LLAMA))
    GPT(make_config(GPT2))


def test_a_tied_head_is_the_embedding_through_every_move():
    with torch.device("meta"):
        model = GPT(make_config(GPT2))
    for moved in (model, model.to_empty(device="cpu"), model.to(torch.bfloat16), model.double()):
        assert moved.head.weight is moved.embed.weight
        assert "head.weight" not in dict(moved.named_parameters())
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    model.tie()
    assert model.head.weight is model.embed.weight


def test_an_untied_head_is_a_parameter_of_its_own():
    model = build_model(make_config(LLAMA), seed=1)
    assert model.head.weight is not model.embed.weight
    assert "head.weight" in dict(model.named_parameters())
    model.tie()
    assert model.head.weight is not model.embed.weight


@FAMILIES
def test_bf16_computes_what_fp32_does_to_its_own_precision(family):
    config = make_config(family, init_std=0.05)
    exact, rough = build_model(config, seed=1), build_model(config, seed=1, dtype=torch.bfloat16)
    tokens, labels = batch()
    assert rough(tokens).dtype == torch.bfloat16
    loss = rough(tokens, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact(tokens, labels), rtol=5e-3, atol=0)

"""Initial values: the published distributions, and the same bits whoever asks for which range."""

import itertools
import math
import random

import pytest
import torch

from megatrain.config import ModelConfig
from megatrain.model.count import parameter_shapes
from megatrain.model.init import BLOCK, build_model, initial_block, initial_values
from megatrain.parallel.plan import chunk

torch.set_num_threads(1)

CONFIG = ModelConfig(num_layers=8, hidden_size=64, num_heads=4, vocab_size=97, bias=True, norm="layernorm")
LARGE = (3, BLOCK)  # three generators' worth


def test_any_split_into_ranges_gives_the_same_bits():
    """Random cuts, among them ones inside, at and across the borders of generator blocks."""
    whole = initial_values(CONFIG, "embed.weight", LARGE, seed=5)
    draw = random.Random(0)
    cuts = sorted({0, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, *(draw.randrange(3 * BLOCK) for _ in range(20))})
    pieces = [initial_values(CONFIG, "embed.weight", LARGE, 5, a, b) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(pieces), whole)
    assert initial_values(CONFIG, "embed.weight", LARGE, 5, 7, 7).shape == (0,)


def test_a_value_does_not_depend_on_the_parameter_s_shape():
    """What stands at a flat index is the same in a padded or a longer parameter."""
    short = initial_values(CONFIG, "embed.weight", (97, 64), seed=5)
    long = initial_values(CONFIG, "embed.weight", (128, 64), seed=5)
    assert torch.equal(short, long[: short.numel()])


def test_the_end_of_a_parameter_too_large_for_memory_is_cheap():
    shape = (10**6, 10**6)
    values = initial_values(CONFIG, "embed.weight", shape, seed=5, start=10**12 - 10)
    assert values.shape == (10,) and values.abs().max() < 1


def test_seeds_names_and_blocks_have_streams_of_their_own():
    first = initial_values(CONFIG, "blocks.0.attn.q.weight", (64, 64), seed=5)
    streams = [
        first,
        initial_values(CONFIG, "blocks.0.attn.q.weight", (64, 64), seed=6),
        initial_values(CONFIG, "blocks.0.attn.q.weight", (64, 64), seed=5 + 2**32),
        initial_values(CONFIG, "blocks.1.attn.q.weight", (64, 64), seed=5),
        initial_values(CONFIG, "blocks.0.attn.q.weight", LARGE, 5, BLOCK, BLOCK + 4096),
    ]
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlations.abs().max() < 0.1


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embed.weight", 0.02),
        ("positions.weight", 0.02),
        ("head.weight", 0.02),
        ("blocks.3.attn.q.weight", 0.02),
        ("blocks.3.mlp.gate.weight", 0.02),
        ("blocks.3.mlp.up.weight", 0.02),
        ("blocks.3.attn.o.weight", 0.02 / math.sqrt(16)),
        ("blocks.3.mlp.down.weight", 0.02 / math.sqrt(16)),
    ],
)
def test_matrices_are_normal_with_residual_projections_scaled_by_depth(name, std):
    values = initial_values(CONFIG, name, (1000, 400), seed=1)
    assert values.dtype == torch.float32
    assert float(values.std()) == pytest.approx(std, rel=0.01)
    assert abs(float(values.mean())) < 4 * std / math.sqrt(values.numel())
    inside = float((values.abs() < std).float().mean())
    assert inside == pytest.approx(0.6827, abs=0.005)


def test_norms_start_at_one_and_biases_at_zero():
    for name in ("final_norm.weight", "blocks.0.attn.q_norm.weight", "blocks.0.mlp_norm.weight"):
        assert torch.equal(initial_values(CONFIG, name, (64,), 1), torch.ones(64))
    for name in ("final_norm.bias", "blocks.0.attn.q.bias", "blocks.0.mlp.down.bias"):
        assert torch.equal(initial_values(CONFIG, name, (64,), 1, 3, 9), torch.zeros(6))


def test_a_built_model_holds_its_initial_values_and_starts_near_the_uniform_loss():
    model = build_model(CONFIG, seed=9)
    for name, parameter in model.named_parameters():
        expected = initial_values(CONFIG, name, tuple(parameter.shape), 9).view(parameter.shape)
        assert torch.equal(parameter, expected), name
    ids = torch.randint(0, 97, (4, 33), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:]).detach() / (4 * 32)
    assert float(loss) == pytest.approx(math.log(97), abs=0.1)


def test_a_model_in_bf16_holds_the_rounded_values():
    exact, rounded = build_model(CONFIG, seed=9), build_model(CONFIG, seed=9, dtype=torch.bfloat16)
    for (name, a), b in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


@pytest.mark.parametrize("name", ["blocks.0.attn.q.weight", "blocks.0.mlp.down.weight", "final_norm.weight"])
def test_a_block_has_the_bits_of_the_whole(name):
    """Any range of any block of a parameter, cut by columns or by rows, is the same bits as cutting the whole."""
    config = ModelConfig(vocab_size=31)
    shape = parameter_shapes(config)[name]
    whole = initial_values(config, name, shape, 7).view(shape)
    for part in range(3):
        for dimension in range(len(shape)):
            origin, block = [0] * len(shape), list(shape)
            origin[dimension], block[dimension] = chunk(shape[dimension], 3, part)
            expected = whole.narrow(dimension, origin[dimension], block[dimension]).reshape(-1)
            for start, stop in ((0, len(expected)), (5, len(expected) - 3), (9, 9), (len(expected) - 1, len(expected))):
                made = initial_block(config, name, shape, 7, tuple(origin), tuple(block), start, stop)
                assert torch.equal(made, expected[start:stop])

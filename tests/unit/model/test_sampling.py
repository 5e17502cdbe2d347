"""Sampling: the distribution that transformers draws from, reproducible, and refused where positions end."""

import itertools
import logging

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatrain.config import ModelConfig
from megatrain.errors import ConfigError
from megatrain.model.init import build_model
from megatrain.model.sampling import distribution, draw, generate

torch.set_num_threads(1)

GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True, "tie_embeddings": True}


def make_model(**changes):
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "vocab_size": 61, "max_seq_len": 16}
    return build_model(ModelConfig(**{**shape, "init_std": 0.3, **changes}), seed=3)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.5, 20, 0.3), (2.0, 1000, 0.999), (1.0, 1, 0.01)],
)
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    torch.testing.assert_close(distribution(logits, temperature, top_k, top_p), scores.softmax(-1)[0])


@pytest.mark.parametrize("settings", [(1e-320, 0, 1.0), (1e-45, 3, 1.0), (1.0, 0, 1e-320), (1e-320, 0, 1e-320)])
def test_settings_next_to_zero_leave_the_likeliest_id_alone(settings):
    logits = torch.tensor([2.0, 900.0, -900.0, 1.0])
    assert distribution(logits, *settings).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([draw(logits, 1.0, 3, 1.0, generator) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(counts / 4000, distribution(logits, 1.0, 3, 1.0), atol=0.03, rtol=0)
    assert counts[3] == 0


def test_greedy_takes_the_likeliest_token_of_the_whole_sequence_each_time():
    model, ids = make_model(), [5, 9, 2]
    drawn = list(generate(model, ids, max_new_tokens=10, temperature=0))
    for token in drawn:
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids = [*ids, token]
    assert len(drawn) == 10


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    model = make_model()
    first, again, other = (list(generate(model, [1, 2], max_new_tokens=14, seed=s)) for s in (4, 4, 5))
    assert first == again != other


def test_generation_ends_before_the_stop_token():
    model = make_model()
    free = list(generate(model, [1, 2], max_new_tokens=12, seed=4))
    stop = free[5]
    assert list(generate(model, [1, 2], max_new_tokens=12, seed=4, stop_ids=[stop])) == free[: free.index(stop)]


def test_tokens_are_streamed_and_gradients_stay_on_between_them():
    model = make_model()
    forwards = []
    model.blocks[0].register_forward_hook(lambda *_: forwards.append(1))
    stream = generate(model, [1, 2], max_new_tokens=12)
    for drawn in itertools.islice(stream, 3):
        assert 0 <= drawn < 61 and torch.is_grad_enabled()
    assert len(forwards) == 3


def test_each_token_is_computed_once():
    model = make_model()
    lengths = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    list(generate(model, [1, 2, 3, 4], max_new_tokens=4))
    assert lengths == [4, 1, 1, 1]


def test_learned_positions_are_used_to_the_last_and_not_beyond():
    model = make_model(**GPT2, num_kv_heads=None)
    assert len(list(generate(model, [1] * 10, max_new_tokens=7))) == 7
    with pytest.raises(ConfigError, match=r"max_new_tokens=8 exceed model\.max_seq_len=16.*try max_new_tokens=7"):
        generate(model, [1] * 10, max_new_tokens=8)
    with pytest.raises(ConfigError, match="prompt must be shorter"):
        generate(model, [1] * 17, max_new_tokens=1)


def test_rotary_positions_go_on_past_the_trained_length_with_a_warning(caplog):
    model = make_model()
    with caplog.at_level(logging.WARNING):
        assert len(list(generate(model, [1] * 10, max_new_tokens=20))) == 20
    assert "model.max_seq_len=16" in caplog.text


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([3, 61], "id 61"), ([-1], "id -1")])
def test_a_prompt_the_model_cannot_read_is_refused_at_once(prompt, message):
    with pytest.raises(ConfigError, match=message):
        generate(make_model(), prompt, max_new_tokens=1)


def test_dropout_is_off_while_generating():
    model = make_model(dropout=0.5)
    assert list(generate(model, [1], max_new_tokens=5, temperature=0)) == list(
        generate(make_model(), [1], max_new_tokens=5, temperature=0)
    )

"""Continuations in batches are those of each prompt alone."""

import pytest
import torch

from megatrain.config import ModelConfig
from megatrain.evaluation.continuation import Prompt, Sampling, continuations
from megatrain.model.init import build_model
from megatrain.model.sampling import generate

SHAPE = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "ffn_size": 48, "vocab_size": 90}


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_prompts_of_any_lengths_are_continued_as_alone(temperature):
    """Each row begins with its own seed, and ends by itself: at its length, or where `is_over` says so."""
    model = build_model(ModelConfig(**SHAPE, max_seq_len=64, init_std=0.3), seed=5).eval()
    chooser = torch.Generator().manual_seed(1)
    prompts = []
    for number, length in enumerate((3, 17, 5, 5, 11, 1, 29)):
        ids = torch.randint(90, (length,), generator=chooser).tolist()
        prompts.append(Prompt(ids, 4 + 3 * number, number, lambda token: token < 5))
    found = dict(continuations(model, prompts, Sampling(temperature, top_k=20), batch_size=3))
    assert sorted(found) == list(range(7))
    for number, prompt in enumerate(prompts):
        settings = {"temperature": temperature, "top_k": 20, "seed": number, "stop_ids": range(5)}
        assert found[number] == list(generate(model, prompt.ids, max_new_tokens=prompt.max_new_tokens, **settings))
    assert any(len(found[number]) < prompts[number].max_new_tokens for number in found)
    assert any(len(found[number]) == prompts[number].max_new_tokens for number in found)

"""Continuations in batches are those of each prompt alone."""

import torch

from megatrain.config import ModelConfig
from megatrain.evaluation.continuation import Prompt, continuations
from megatrain.inference.draw import SamplingSettings
from megatrain.model.init import build_model
from megatrain.model.sampling import generate

SHAPE = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "ffn_size": 48, "vocab_size": 90}


def test_prompts_of_any_lengths_are_continued_as_alone():
    """Each ends by itself: at its length, or where `is_over` says so, which gets each token once."""
    model = build_model(ModelConfig(**SHAPE, max_seq_len=64, init_std=0.3), seed=5).eval()
    chooser = torch.Generator().manual_seed(1)
    prompts, found = [], []

    def collector(drawn):
        return lambda token: drawn.append(token) or token < 12

    for number, length in enumerate((3, 17, 5, 5, 11, 1, 29)):
        ids = torch.randint(90, (length,), generator=chooser).tolist()
        found.append([])
        prompts.append(Prompt(ids, SamplingSettings(4 + 3 * number, 0.0), collector(found[-1])))
    assert sorted(continuations(model, prompts, batch_size=3)) == list(range(7))
    for prompt, drawn in zip(prompts, found, strict=True):
        most = prompt.settings.max_new_tokens
        expected = list(generate(model, prompt.ids, max_new_tokens=most, temperature=0))
        end = next((at + 1 for at, token in enumerate(expected) if token < 12), most)
        assert drawn == expected[:end]
    lengths = [len(drawn) - prompt.settings.max_new_tokens for prompt, drawn in zip(prompts, found, strict=True)]
    assert min(lengths) < 0 == max(lengths)

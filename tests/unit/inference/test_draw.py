"""Draws of a batch: the distribution of transformers for each row, and random numbers that are well spread."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatrain.inference.draw import SamplingSettings, draw, uniform

SETTINGS = [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.5, 20, 0.3), (2.0, 1000, 0.999), (1.0, 1, 0.01),
    (0.0, 0, 1.0), (1e-320, 0, 1e-320),
]  # fmt: skip


def test_each_row_is_drawn_from_the_distribution_of_transformers():
    """4,000 draws of rows with different settings at once; ids that are cut off never come."""
    logits = 2 * torch.randn(len(SETTINGS), 30, generator=torch.Generator().manual_seed(0))
    rows, number = logits.repeat(4000, 1), len(SETTINGS)
    settings = [
        SamplingSettings(1, temperature, top_k, top_p, seed=seed)
        for seed in range(4000)
        for temperature, top_k, top_p in SETTINGS
    ]
    tokens = torch.tensor([one.token for one in draw(rows, settings, [3] * len(settings))]).view(4000, number)
    for row, (temperature, top_k, top_p) in enumerate(SETTINGS):
        scores = TemperatureLogitsWarper(max(temperature, 1e-4))(None, logits[row : row + 1])
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        expected = scores.softmax(-1)[0]
        counts = torch.bincount(tokens[:, row], minlength=30) / 4000
        assert not counts[expected == 0].any()
        torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)


def test_log_probabilities_and_the_likeliest_ids_are_those_before_truncation():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 4.0, 1.0, 2.0]])
    settings = [SamplingSettings(1, temperature=2.0, top_k=1), SamplingSettings(1, temperature=0, top_logprobs=9)]
    first, second = draw(logits, settings, [0, 0])
    assert (first.token, first.top) == (0, []) and [pair[0] for pair in second.top] == [1, 3, 2, 0]
    assert first.logprob == pytest.approx(float((logits[0] / 2).log_softmax(-1)[0]))
    assert second.top[0] == (1, second.logprob) == (1, pytest.approx(float(logits[1].log_softmax(-1)[1])))


def test_random_numbers_are_uniform_in_the_seed_and_in_the_index_and_unrelated():
    numbers = torch.tensor([[uniform(seed, index) for index in range(300)] for seed in range(300)], dtype=torch.float64)
    for values in (numbers.flatten(), numbers[0], numbers[:, 0]):
        ordered = values.sort().values
        gap = (ordered - torch.linspace(0, 1, len(values), dtype=torch.float64)).abs().max()
        assert gap < 2 / len(values) ** 0.5, "beyond the 99.9% point of Kolmogorov and Smirnov's distance"
    for one, other in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]) < 0.02
    assert uniform(2**64 + 5, 1) == uniform(5, 1) and float(numbers.min()) >= 0 and float(numbers.max()) < 1

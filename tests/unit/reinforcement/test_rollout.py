"""A rollout's rows, weights and advantages are as defined, and its tensors come back from a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatrain.kernels import IGNORE_INDEX
from megatrain.reinforcement.rollout import Rollout, Widths, assemble, group_advantages, token_weights
from megatrain.reinforcement.sampler import Samples
from megatrain.reinforcement.stream import rollout_metrics

PROMPTS = [[5, 6, 7], [8], [9, 9], [4, 4, 4, 4]]
REPLIES = [[1, 2], [3], [1, 1, 1], [2, 3]]


def rollout() -> Rollout:
    log_probs = [[-0.1 * token for token in reply] for reply in REPLIES]
    return assemble(PROMPTS, REPLIES, log_probs, np.array([1.0, -1.0, 0.5, 0.0]), seq_len=7)


def test_labels_are_the_reply_alone_and_each_has_its_values() -> None:
    (batch,) = rollout().micro_batches(np.array([[2, 1]]), "dapo", 3, Widths(7))
    assert batch.tokens.tolist() == [[9, 9, 1, 1], [8, 3, 0, 0]], "the last token of a reply is a label only"
    ignored = IGNORE_INDEX
    assert batch.labels.tolist() == [[ignored, 1, 1, 1], [3, ignored, ignored, ignored]]
    assert batch.old_log_probs is not None and batch.advantages is not None and batch.loss_weights is not None
    torch.testing.assert_close(batch.old_log_probs, torch.tensor([[0, -0.1, -0.1, -0.1], [-0.3, 0, 0, 0]]))
    assert batch.advantages.tolist() == [[0, 0.5, 0.5, 0.5], [-1, 0, 0, 0]]
    assert batch.loss_weights.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize(("step", "width"), [(1, 4), (4, 4), (3, 6), (7, 7), (100, 7)])
def test_rows_are_as_long_as_the_longest_reply_needs(step: int, width: int) -> None:
    (batch,) = rollout().micro_batches(np.array([[2, 1]]), "dapo", 3, Widths(7, step))
    assert batch.tokens.shape == batch.labels.shape == (2, width)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
def test_a_mean_over_tokens_with_the_weights_is_the_named_average(loss: str) -> None:
    bounds = rollout().bounds
    lengths = (bounds[:, 1] - bounds[:, 0]).double()
    losses = [torch.arange(float(n)) + 1 for n in lengths]
    weights = token_weights(bounds, loss, 5)
    mean = sum(float(w) * values.sum() for w, values in zip(weights, losses, strict=True)) / lengths.sum()
    expected = {
        "dapo": torch.cat(losses).mean(),
        "grpo": torch.stack([values.mean() for values in losses]).mean(),
        "dr_grpo": torch.cat(losses).sum() / (4 * 5),
    }
    assert float(mean) == pytest.approx(float(expected[loss]))


def test_advantages_are_relative_to_the_group() -> None:
    rewards = np.array([1.0, 0.0, 2.0, 1.0, 0.1, 0.1, 0.1, 0.1])
    assert group_advantages(rewards, 4, "none").tolist() == [0, -1, 1, 0, 0, 0, 0, 0]
    scaled = group_advantages(rewards, 4, "group")
    expected = torch.tensor([0.0, -1, 1, 0]) / (torch.tensor([1.0, 0, 2, 1]).std() + 1e-4)
    np.testing.assert_allclose(scaled, [*expected.tolist(), 0, 0, 0, 0], rtol=1e-6)


def test_tensors_come_back_from_a_checkpoint() -> None:
    first = rollout()
    rows = [[0.5] * len(reply) for reply in REPLIES]
    for one in (first, first.with_reference(rows), first.with_values(rows, rows)):
        again = Rollout.of_state(one.state())
        assert again.state().keys() == one.state().keys()
        assert all(torch.equal(again.state()[name], tensor) for name, tensor in one.state().items())


def test_metrics_tell_the_mean_reward_with_its_error_and_each_reward_alone() -> None:
    rewards = np.array([[1.0, 2], [0, 2], [1, 2], [1, 2]])
    found = Samples(
        [[1, 2], [1], [1], [1]], [[-1.0, -2], [-1], [-1], [-1]], np.array([1, 0, 1, 1], bool), rewards, None
    )
    metrics = rollout_metrics(found, rewards @ [1.0, 0.5], ["/home/me/own.py:good", "contains"], 2)
    assert metrics == {
        "reward": 1.75,
        "reward_se": pytest.approx(np.std([1.5, 2.0], ddof=1) / np.sqrt(2)),
        "reward/own.py:good": 0.75,
        "reward/contains": 2.0,
        "reply_tokens": 1.25,
        "stop_rate": 0.75,
        "entropy": 6 / 5,
        "groups_without_signal": 0.5,
    }

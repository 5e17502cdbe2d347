"""PPO's advantages, loss and gradients equal a reference in float64 that is written from the papers, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatrain.config import MethodConfig, ModelConfig
from megatrain.model.gpt import GPT
from megatrain.model.init import initial_values
from megatrain.optim.objective import LossMeter
from megatrain.optim.policy_gradient import policy_gradient
from megatrain.reinforcement.advantages import generalized_advantages, token_rewards, value_metrics, whitened
from megatrain.reinforcement.rollout import Widths, assemble

VOCAB, WIDTH, SEQ_LEN = 11, 6, 12
PROMPTS = [[3, 4], [5], [6, 7, 8], [9, 1, 2], [4, 4]]
REPLIES = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [2, 2], [7, 1, 5, 3]]
REWARDS = np.array([1.0, 0.0, 2.5, -1.0, 0.5])
CASES = [
    {},
    {"gamma": 0.9, "gae_lambda": 0.7, "whiten": False, "kl": 0.3, "value_weight": 0.7, "temperature": 0.6},
    {"gae_lambda": 0.0, "clip": 0.1, "clip_high": 0.4, "value_clip": None, "loss": "grpo"},
    {"gae_lambda": 1.0, "gamma": 0.5, "kl": 0.05, "value_clip": 0.05},
]


@dataclass
class Sampled:
    """What is known of the replies: rows of a number for each token."""

    log_probs: list[np.ndarray]
    reference: list[np.ndarray]
    values: list[np.ndarray]


@pytest.fixture(scope="module")
def sampled() -> Sampled:
    draw = np.random.default_rng(3)
    log_probs = [-2.4 + 0.3 * draw.standard_normal(len(reply)) for reply in REPLIES]
    reference = [row + 0.4 * draw.standard_normal(len(row)) for row in log_probs]
    return Sampled(log_probs, reference, [draw.standard_normal(len(reply)) for reply in REPLIES])


def expected_advantages(method: MethodConfig, sampled: Sampled) -> tuple[list[list[float]], list[list[float]]]:
    """Return advantages and returns of each token: sums of temporal differences, as in equation 16 of GAE's paper."""
    advantages, returns = [], []
    for i, values in enumerate(sampled.values):
        n = len(values)
        rewards = [-method.kl * (sampled.log_probs[i][t] - sampled.reference[i][t]) for t in range(n)]
        rewards[-1] += REWARDS[i]
        deltas = []
        for t in range(n):
            following = values[t + 1] if t + 1 < n else 0.0
            deltas.append(rewards[t] + method.gamma * following - values[t])
        own = [sum((method.gamma * method.gae_lambda) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
        advantages.append(own)
        returns.append([own[t] + values[t] for t in range(n)])
    if method.whiten:
        every = [a for row in advantages for a in row]
        mean = sum(every) / len(every)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every))
        advantages = [[(a - mean) / deviation for a in row] for row in advantages]
    return advantages, returns


def own_advantages(method: MethodConfig, sampled: Sampled) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return what the rollout's code makes of the same."""
    rewards = token_rewards(REWARDS, sampled.log_probs, sampled.reference if method.kl else None, method.kl)
    advantages = generalized_advantages(rewards, sampled.values, method.gamma, method.gae_lambda)
    returns = [a + v for a, v in zip(advantages, sampled.values, strict=True)]
    return whitened(advantages) if method.whiten else advantages, returns


@pytest.mark.parametrize("case", CASES, ids=str)
def test_advantages_and_returns_are_those_of_the_paper(case: dict[str, float], sampled: Sampled) -> None:
    method = MethodConfig(name="ppo", **case)
    for found, expected in zip(own_advantages(method, sampled), expected_advantages(method, sampled), strict=True):
        for row, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(row, other, rtol=1e-6, atol=1e-9)


def expected_loss(
    method: MethodConfig, sampled: Sampled, hidden: np.ndarray, head: np.ndarray, value: np.ndarray
) -> tuple[float, dict[str, np.ndarray], dict[str, float]]:
    """Return the mean loss of the tokens, its gradients, and the means of the metrics.

    Equations 7 and 9 of PPO's paper, without its entropy term; values are clipped as ratios are.
    """
    advantages, returns = expected_advantages(method, sampled)
    total = sum(map(len, REPLIES))
    high = method.clip if method.clip_high is None else method.clip_high
    loss, found = 0.0, dict.fromkeys(("clip_fraction", "value_loss", "value_clip_fraction"), 0.0)
    gradients = {name: np.zeros_like(x) for name, x in (("hidden", hidden), ("head", head), ("value", value))}
    for i, reply in enumerate(REPLIES):
        weight = 1 / total if method.loss == "dapo" else 1 / (len(REPLIES) * len(reply))
        for t, token in enumerate(reply):
            place = len(PROMPTS[i]) - 1 + t
            x = hidden[i, place]
            logits = head @ x / method.temperature
            p = np.exp(logits) / np.exp(logits).sum()
            ratio = p[token] / math.exp(sampled.log_probs[i][t])
            a = advantages[i][t]
            surrogate, clipped = ratio * a, min(max(ratio, 1 - method.clip), 1 + high) * a
            loss -= weight * min(surrogate, clipped)
            v, old, target = float(value[0] @ x), sampled.values[i][t], returns[i][t]
            near = v if method.value_clip is None else old + min(max(v - old, -method.value_clip), method.value_clip)
            errors = ((v - target) ** 2 / 2, (near - target) ** 2 / 2)
            loss += weight * method.value_weight * max(errors)
            by_log_p = -weight * surrogate if surrogate <= clipped else 0.0
            by_value = weight * method.value_weight * (v - target) if errors[0] >= errors[1] else 0.0
            by_logits = by_log_p * (np.eye(len(p))[token] - p) / method.temperature
            gradients["head"] += np.outer(by_logits, x)
            gradients["value"][0] += by_value * x
            gradients["hidden"][i, place] += head.T @ by_logits + by_value * value[0]
            found["clip_fraction"] += (surrogate > clipped) / total
            found["value_loss"] += max(errors) / total
            found["value_clip_fraction"] += (errors[1] > errors[0]) / total
    return loss, gradients, found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_gradients_and_metrics_are_those_of_the_papers(case: dict[str, float], sampled: Sampled) -> None:
    method = MethodConfig(name="ppo", **case)
    draw = np.random.default_rng(4)
    hidden, head = draw.standard_normal((len(REPLIES), SEQ_LEN, WIDTH)), draw.standard_normal((VOCAB, WIDTH)) * 0.2
    value = draw.standard_normal((1, WIDTH)) * 0.3
    expected, gradients, metrics = expected_loss(method, sampled, hidden, head, value)

    model = GPT(ModelConfig(num_layers=1, num_heads=1, hidden_size=WIDTH, vocab_size=VOCAB), has_values=True)
    assert model.value is not None
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(head))
        model.value.weight.copy_(torch.from_numpy(value))
    advantages, returns = own_advantages(method, sampled)
    rollout = assemble(PROMPTS, REPLIES, sampled.log_probs, advantages, SEQ_LEN).with_values(sampled.values, returns)
    meter = LossMeter(policy_gradient(method), torch.device("cpu"))
    batches = rollout.micro_batches(np.arange(len(REPLIES)).reshape(-1, 1), method.loss, 6, Widths(SEQ_LEN))
    inputs = torch.from_numpy(hidden).float().requires_grad_()
    loss = torch.zeros(())
    for row, batch in enumerate(batches):
        loss = loss + meter(model, inputs[row : row + 1, : batch.tokens.shape[1]], batch)
    (loss / meter.count(batches)).backward()
    assert float(loss.detach()) / meter.count(batches) == pytest.approx(expected, abs=1e-5)
    own = {"hidden": inputs.grad, "head": model.head.weight.grad, "value": model.value.weight.grad}
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-2
        np.testing.assert_allclose(own[name], gradient, atol=1e-5, rtol=1e-5, err_msg=name)
    scalars = dict(zip(meter.objective.scalar_names, (meter.take() / rollout.num_tokens).tolist(), strict=True))
    assert 0 < metrics["clip_fraction"] < 1 and (method.value_clip is None or 0 < metrics["value_clip_fraction"] < 1)
    for name, mean in metrics.items():
        assert scalars[name] == pytest.approx(mean, abs=1e-5), name


def test_metrics_tell_how_much_of_the_returns_the_values_explain() -> None:
    values, returns = [[1.0, 2.0], [3.0]], [np.array([1.0, 2.5]), np.array([2.5])]
    found = value_metrics(values, returns, [[-1.0, -2.0], [-1.0]], [[-1.0, -1.0], [-2.0]])
    assert found["value"] == 2 and found["explained_variance"] == pytest.approx(1 - np.var([0, 0.5, -0.5]) / 0.5)
    assert found["kl"] == pytest.approx((0 + math.exp(1) - 2 + math.exp(-1)) / 3)
    assert value_metrics(values, [np.ones(2), np.ones(1)], [], None) == {"value": 2, "explained_variance": 0}


def test_a_value_head_begins_at_0() -> None:
    assert not initial_values(ModelConfig(), "value.weight", (1, 8), seed=1).any()

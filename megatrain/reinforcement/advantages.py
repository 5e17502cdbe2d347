"""Advantages and returns of replies whose tokens have values, as PPO needs them. All in float64 on the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Row = Sequence[float] | np.ndarray
"""A number for each token of a reply."""

TINY = 1e-8
"""Added to a standard deviation before anything is divided by it."""


def token_rewards(
    rewards: np.ndarray, log_probs: Sequence[Row], reference: Sequence[Row] | None, kl: float
) -> list[np.ndarray]:
    """Return the reward of each token: its reply's (`[R]`) at the last one, less `kl (log p - log p_reference)` at all.

    The log-probabilities are those of the sampled tokens. Source: Ziegler et al., 2019, arXiv:1909.08593, equation 2.
    """
    found = []
    for row, (reward, now) in enumerate(zip(rewards, log_probs, strict=True)):
        each = np.zeros(len(now)) if reference is None else -kl * (np.asarray(now) - np.asarray(reference[row]))
        each[-1] += reward
        found.append(each)
    return found


def generalized_advantages(
    rewards: Sequence[Row], values: Sequence[Row], gamma: float, gae_lambda: float
) -> list[np.ndarray]:
    """Return the advantage of each token (Schulman et al., 2016, arXiv:1506.02438, equations 11 to 16).

    `values[i][t]` is the value of what stands before token `t` of reply `i`. What comes after a reply is worth 0,
    whether it ended by itself or was cut off.
    """
    lengths = [len(row) for row in values]
    worth, earned = np.zeros((2, len(lengths), max(lengths, default=0) + 1))
    for i, n in enumerate(lengths):
        worth[i, :n], earned[i, :n] = values[i], rewards[i]
    surprises = earned[:, :-1] + gamma * worth[:, 1:] - worth[:, :-1]  # 0 after the end of a reply
    advantages, carried = np.empty_like(surprises), np.zeros(len(lengths))
    for t in reversed(range(surprises.shape[1])):
        carried = surprises[:, t] + gamma * gae_lambda * carried
        advantages[:, t] = carried
    return [row[:n] for row, n in zip(advantages, lengths, strict=True)]


def whitened(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the rows with the mean over all tokens taken off, divided by the standard deviation over all tokens."""
    together = np.concatenate(rows)
    return [(row - together.mean()) / (together.std() + TINY) for row in rows]


def value_metrics(
    values: Iterable[Row],
    returns: Sequence[np.ndarray],
    log_probs: Iterable[Row],
    reference: Iterable[Row] | None,
) -> dict[str, float]:
    """Return what metrics.jsonl records of a rollout whose tokens have values.

    - `value`: the mean of the values
    - `explained_variance`: `1 - var(returns - values) / var(returns)`; 0 if all returns are equal
    - `kl`: the estimate `exp(d) - d - 1` of the divergence from the reference in nats a token, where `d` is the
      reference's log-probability of a sampled token minus the model's; only with a reference
    """
    worth, target = np.concatenate([np.asarray(row) for row in values]), np.concatenate(returns)
    spread = float(target.var())
    found = {
        "value": float(worth.mean()),
        "explained_variance": 1 - float((target - worth).var()) / spread if spread else 0.0,
    }
    if reference is not None:
        gap = np.concatenate([np.subtract(then, now) for then, now in zip(reference, log_probs, strict=True)])
        found["kl"] = float((np.exp(gap) - gap - 1).mean())
    return found

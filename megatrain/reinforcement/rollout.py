"""A rollout: the sampled replies that one or several optimizer steps learn from, equal on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from megatrain.data.batch import MicroBatch
from megatrain.kernels import IGNORE_INDEX
from megatrain.reinforcement.advantages import Row

PREFIX = "buffer.rollout."
"""How the names of a rollout's tensors begin in a checkpoint."""

TINY = 1e-4
"""Added to a group's standard deviation before its advantages are divided by it."""


@dataclass(frozen=True)
class Rollout:
    """`R` replies with their prompts, and what the loss needs to know of them. All tensors are on the host.

    - `tokens`: prompt and reply, int64 `[R, T + 1]`, padded with 0
    - `bounds`: where each reply begins and ends in its row, int64 `[R, 2]`
    - `log_probs`: of each token after the first, when it was sampled, fp32 `[R, T]`; 0 outside the reply
    - `advantages`: float32 `[R, T]`, of the same tokens
    - `reference_log_probs`: as `log_probs`, under the reference
    - `values`, `returns`: what a value head gave the places of these tokens, and what it should have given: fp32
      `[R, T]`
    """

    tokens: Tensor
    bounds: Tensor
    log_probs: Tensor
    advantages: Tensor
    reference_log_probs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    def state(self) -> dict[str, Tensor]:
        """Return the tensors by their names in a checkpoint."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {f"{PREFIX}{name}": tensor for name, tensor in held.items() if tensor is not None}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Rollout:
        """Return the rollout whose `state` this is."""
        return cls(**{name.removeprefix(PREFIX): tensor for name, tensor in state.items()})

    @property
    def num_tokens(self) -> int:
        """Tokens of all replies."""
        return int((self.bounds[:, 1] - self.bounds[:, 0]).sum())

    def with_reference(self, log_probs: Sequence[Row]) -> Rollout:
        """Return the rollout with the reference's log-probabilities of each reply's tokens."""
        return replace(self, reference_log_probs=self._placed(log_probs))

    def with_values(self, values: Sequence[Row], returns: Sequence[Row]) -> Rollout:
        """Return the rollout with the value and the return of each reply's tokens."""
        return replace(self, values=self._placed(values), returns=self._placed(returns))

    def _placed(self, rows: Sequence[Row]) -> Tensor:
        """Return a number for each token of the replies where `log_probs` has that token's, fp32 `[R, T]`."""
        placed = np.zeros(self.log_probs.shape, np.float32)
        for row, (start, stop) in enumerate(self.bounds.tolist()):
            placed[row, start - 1 : stop - 1] = rows[row]
        return torch.from_numpy(placed)

    def micro_batches(self, rows: np.ndarray, loss: str, max_new_tokens: int, widths: Widths) -> list[MicroBatch]:
        """Return the micro-batches of some replies, `rows` `[num_micro_batches, micro_batch_size]`."""
        weights = token_weights(self.bounds, loss, max_new_tokens)
        return [self._micro_batch(torch.from_numpy(numbers), weights, widths) for numbers in rows]

    def _micro_batch(self, numbers: Tensor, weights: Tensor, widths: Widths) -> MicroBatch:
        bounds = self.bounds[numbers]
        width = widths.of(int(bounds[:, 1].max()) - 1)
        tokens = self.tokens[numbers]
        places = torch.arange(1, width + 1)
        counts = (places >= bounds[:, :1]) & (places < bounds[:, 1:])

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[numbers, :width].contiguous()

        return MicroBatch(
            tokens=tokens[:, :width].contiguous(),
            labels=tokens[:, 1 : width + 1].masked_fill(~counts, IGNORE_INDEX),
            loss_weights=(weights[numbers][:, None] * counts).contiguous(),
            old_log_probs=cut(self.log_probs),
            advantages=cut(self.advantages),
            reference_log_probs=cut(self.reference_log_probs),
            old_values=cut(self.values),
            returns=cut(self.returns),
        )


@dataclass(frozen=True)
class Widths:
    """How long the rows of a micro-batch are: as its longest reply needs, in multiples of `step`, up to `seq_len`."""

    seq_len: int
    step: int = 1

    def of(self, needed: int) -> int:
        """Return the row length for replies that need `needed` inputs."""
        return min(self.seq_len, -(-needed // self.step) * self.step)


def token_weights(bounds: Tensor, loss: str, max_new_tokens: int) -> Tensor:
    """Return the weight of each reply's tokens, fp32 `[R]`, in a mean over all tokens of all replies.

    With `dapo` every token weighs the same (Yu et al., 2025, arXiv:2503.14476). With `grpo` every reply does (Shao et
    al., 2024, arXiv:2402.03300). With `dr_grpo` a token's weight does not depend on how long the replies are: the sum
    is divided by the largest possible number of tokens (Liu et al., 2025, arXiv:2503.20783).
    """
    lengths = (bounds[:, 1] - bounds[:, 0]).double()
    if loss == "dapo":
        return torch.ones(len(bounds))
    share = lengths.sum() / len(bounds)
    weights = share / lengths.clamp(min=1) if loss == "grpo" else (share / max_new_tokens).expand(len(bounds))
    return weights.float()


def group_advantages(rewards: np.ndarray, group_size: int, scale: str) -> np.ndarray:
    """Return each reply's advantage, float64 `[R]`: its reward minus the mean of its group.

    With `scale="group"` it is divided by the group's standard deviation (of a sample, so with `group_size - 1`).
    """
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdims=True)
    centred[groups.max(1) == groups.min(1)] = 0.0  # a mean may be off by a rounding
    if scale == "group":
        centred /= groups.std(1, ddof=1, keepdims=True) + TINY
    advantages: np.ndarray = centred.reshape(-1)
    return advantages


def assemble(
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    log_probs: Sequence[Sequence[float]],
    advantages: np.ndarray | Sequence[Row],
    seq_len: int,
) -> Rollout:
    """Return the rollout of prompts with their replies, and the log-probabilities of the replies' tokens.

    `advantages` has a number for each reply, `[R]`, or for each token of each reply.
    """
    tokens = np.zeros((len(prompts), seq_len + 1), np.int64)
    sampled, spread = np.zeros((2, len(prompts), seq_len), np.float32)
    bounds = np.zeros((len(prompts), 2), np.int64)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        start, stop = len(prompt), len(prompt) + len(reply)
        tokens[row, :start], tokens[row, start:stop] = prompt, reply
        sampled[row, start - 1 : stop - 1] = log_probs[row]
        spread[row, start - 1 : stop - 1] = advantages[row]
        bounds[row] = start, stop
    return Rollout(*map(torch.from_numpy, (tokens, bounds, sampled, spread)))

"""The stream of batches of a run that learns from its own replies: roll out, then hand the replies to the trainer.

What is sampled at a step depends on the weights at that step and on pure functions of the seed and the step: which
prompts, and each reply's random numbers. So nothing random is saved. A rollout that several steps learn from is part
of their checkpoints, because the weights that made it are gone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatrain.config import MethodConfig, TrainConfig
from megatrain.data.batch import StepBatch
from megatrain.data.chat.prompt import Prompt
from megatrain.data.loader import sample_hash, samples_of_rank
from megatrain.data.order import Order, take
from megatrain.data.prompts import Prompts
from megatrain.engine.whole_model import WholeModel
from megatrain.reinforcement.advantages import generalized_advantages, token_rewards, value_metrics, whitened
from megatrain.reinforcement.rollout import Rollout, Widths, assemble, group_advantages
from megatrain.reinforcement.sampler import Sampler, Samples


class RolloutStream:
    """One rank's endless sequence of `StepBatch`es from `first_step` and `cursor` on.

    A sample is a reply: sample `k` answers prompt `k // group_size` of the order. Every `method.updates` steps the
    model takes the engine's weights (`engine_state`) and replies to the next prompts; the steps until the next rollout
    learn from the same replies. Iterating is collective: every rank must do it at the same step.
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: Prompts,
        order: Order,
        sampler: Sampler,
        model: WholeModel,
        engine_state: Callable[[], Mapping[str, Tensor]],
        *,
        dp_rank: int,
        dp_size: int,
        widths: Widths,
        first_step: int,
        cursor: int,
        rollout: Rollout | None = None,
    ) -> None:
        """Begin; `rollout` is the one in whose middle the run resumes."""
        self._config, self._prompts, self._order = config, prompts, order
        self._sampler, self._model, self._engine_state = sampler, model, engine_state
        self._widths = widths
        self._step, self._cursor, self._rollout = first_step, cursor, rollout
        numbers = np.arange(config.train.global_batch_size)
        self._rows = samples_of_rank(numbers, config.train.micro_batch_size, dp_rank, dp_size)

    def __iter__(self) -> RolloutStream:
        return self

    def __next__(self) -> StepBatch:
        method, size = self._config.method, self._config.train.global_batch_size
        metrics: dict[str, float] = {}
        if (self._step - 1) % method.updates == 0:
            started = time.perf_counter()
            self._rollout, metrics = self._roll_out()
            metrics["rollout_time_s"] = time.perf_counter() - started
        rollout = self._rollout
        assert rollout is not None, "a run resumes in the middle of a rollout only with that rollout"
        micro_batches = rollout.micro_batches(self._rows, method.loss, method.max_new_tokens, self._widths)
        hashes = np.array([sample_hash(row) for row in rollout.tokens[self._rows.reshape(-1)].numpy()], np.uint64)
        self._step += 1
        return StepBatch(micro_batches, hashes, size, self._cursor, metrics)

    def state(self, step: int) -> dict[str, Tensor]:
        """Return what a checkpoint of `step` needs to go on: the rollout, if the next step learns from the same."""
        if step % self._config.method.updates == 0:
            return {}
        assert self._rollout is not None
        return self._rollout.state()

    def close(self, timeout_s: float = 10.0) -> bool:
        """End the process of the rewards; return True."""
        self._sampler.rewards.close()
        return True

    def restart(self, first_step: int, cursor: int, skip_ranges: Iterable[tuple[int, int]]) -> None:
        """Not possible: the loss guard, which would go back to an earlier step, is off in such a run."""
        raise AssertionError("resilience.spike_zscore is 0 with a method that samples")

    def _roll_out(self) -> tuple[Rollout, dict[str, float]]:
        """Sample the replies of the next steps; return them and their metrics."""
        config, method = self._config, self._config.method
        samples, self._cursor = take(self._cursor, config.train.global_batch_size)
        groups = self._order.windows(samples[:: method.group_size] // method.group_size).tolist()
        prompts = [prompt for number in groups for prompt in [self._prompts.read(number)] * method.group_size]
        self._model.take(self._engine_state())
        self._check_weights()
        found = self._sampler(self._model.model, prompts, samples)
        rewards = found.rewards @ reward_weights(method)
        metrics = rollout_metrics(found, rewards, method.rewards, method.group_size)
        questions = [prompt.ids for prompt in prompts]
        if found.values is not None:
            each = token_rewards(rewards, found.log_probs, found.reference, method.kl)
            estimated = generalized_advantages(each, found.values, method.gamma, method.gae_lambda)
            returns = [row + np.asarray(worth) for row, worth in zip(estimated, found.values, strict=True)]
            metrics |= value_metrics(found.values, returns, found.log_probs, found.reference)
            estimated = whitened(estimated) if method.whiten else estimated
            rollout = assemble(questions, found.ids, found.log_probs, estimated, config.train.seq_len)
            return rollout.with_values(found.values, returns), metrics
        advantages = group_advantages(rewards, method.group_size, method.advantages)
        rollout = assemble(questions, found.ids, found.log_probs, advantages, config.train.seq_len)
        return rollout if found.reference is None else rollout.with_reference(found.reference), metrics

    def reply_greedily(self, prompts: Sequence[Prompt]) -> dict[str, float]:
        """Reply to prompts with the engine's weights, greedily; return the metrics of `rollout_metrics` but entropy.

        The stream goes on as if it had not been called. All ranks must call it together.
        """
        method = self._config.method
        self._model.take(self._engine_state())
        found = self._sampler(self._model.model, prompts, np.arange(len(prompts)), is_greedy=True)
        rewards = found.rewards @ reward_weights(method)
        metrics = rollout_metrics(found, rewards, method.rewards, group_size=1)
        return {name: value for name, value in metrics.items() if name != "entropy"}

    def _check_weights(self) -> None:
        """Make sure that all ranks sample with the same weights."""
        world = self._sampler.world
        if world.size > 1:
            own = int(self._model.checksum(), 16) >> 1
            found = world.all_gather(torch.tensor([own]))
            assert bool((found == found[0]).all()), "the ranks do not sample with the same weights"


def reward_weights(method: MethodConfig) -> np.ndarray:
    """Return the weight of each reward in their sum, float64 `[rewards]`."""
    return np.array(method.reward_weights or [1.0] * len(method.rewards))


def rollout_metrics(found: Samples, rewards: np.ndarray, names: Iterable[str], group_size: int) -> dict[str, float]:
    """Return what metrics.jsonl records of a rollout.

    - `reward`, `reward_se`: the mean reward of the replies, and its standard error over prompts
    - `reward/<name>`: the mean of each reward, without its weight
    - `reply_tokens`, `stop_rate`: the mean length of a reply, and the share that ended by themselves
    - `entropy`: the estimate of it that the sampled tokens give: the mean of -log p, in nats a token
    - `groups_without_signal`: the share of prompts whose replies all got the same reward, so that none is preferred
    """
    groups = rewards.reshape(-1, group_size)
    means = groups.mean(1)
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    tokens = sum(map(len, found.ids))
    return {
        "reward": float(rewards.mean()),
        "reward_se": float(error),
        **{f"reward/{_short(name)}": float(mean) for name, mean in zip(names, found.rewards.mean(0), strict=True)},
        "reply_tokens": tokens / len(found.ids),
        "stop_rate": float(found.stopped.mean()),
        "entropy": -sum(map(sum, found.log_probs)) / tokens,
        **({"groups_without_signal": float((groups.max(1) == groups.min(1)).mean())} if group_size > 1 else {}),
    }


def _short(name: str) -> str:
    """Return a reward's name without the path of its file."""
    return name.rpartition("/")[2]

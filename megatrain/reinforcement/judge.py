"""All rewards of a run in their order: functions in a process of their own, and reward models on this rank's device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatrain.checkpoint.manifest import Ancestor, KeptReward
from megatrain.reinforcement.reward_model import RewardModel
from megatrain.reinforcement.rewards import Replies, RewardFunctions, is_function


class Judge:
    """The rewards `names`, of which `models` are loaded. `close` ends the process of the others.

    `fields` are those of the prompts' records, `limit_s` the seconds that a function has, `beat` is called while they
    judge.

    Raises:
        RewardError: a function cannot be loaded, or needs a field that the prompts do not have.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[RewardModel],
        fields: Sequence[str],
        limit_s: float,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.names, self.models, self._beat = list(names), list(models), beat
        functions = [name for name in names if is_function(name)]
        self.num_functions = len(functions)
        self._functions = RewardFunctions(functions, fields, limit_s, beat) if functions else None

    @property
    def kept(self) -> Mapping[str, KeptReward]:
        """What checkpoints keep of the reward models, by name."""
        return {model.name: model.kept for model in self.models}

    @property
    def lines(self) -> list[list[Ancestor]]:
        """For each reward model the models that it came from, and itself."""
        return [model.line for model in self.models]

    def __call__(self, replies: Replies) -> np.ndarray:
        """Return the rewards of the replies, float64 `[replies, rewards]`. Raises RewardError."""
        return self.joined(self.of_functions(replies), self.of_models(replies))

    def of_functions(self, replies: Replies) -> np.ndarray:
        """Return what the functions give, float64 `[replies, functions]`. Raises RewardError."""
        if self._functions is None:
            return np.zeros((len(replies.completions), 0))
        return self._functions(replies)

    def of_models(self, replies: Replies) -> np.ndarray:
        """Return what the models give, float64 `[replies, models]`. Raises RewardError."""
        columns = [model.scores(replies, self._beat) for model in self.models]
        return np.array(columns, np.float64).T.reshape(len(replies.completions), len(self.models))

    def joined(self, functions: np.ndarray, models: np.ndarray) -> np.ndarray:
        """Return both kinds of rewards in the order of `names`, float64 `[replies, rewards]`."""
        columns = {kind: iter(values.T) for kind, values in ((True, functions), (False, models))}
        return np.stack([next(columns[is_function(name)]) for name in self.names], axis=1)

    def close(self) -> None:
        """End the process of the functions."""
        if self._functions is not None:
            self._functions.close()

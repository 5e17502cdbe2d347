"""Which objective each method trains with. The objectives themselves are beside this file, one a method."""

from __future__ import annotations

from collections.abc import Callable

from megatrain.config import TrainConfig
from megatrain.optim.distillation import Distillation
from megatrain.optim.objective import NextToken, Objective
from megatrain.optim.policy_gradient import policy_gradient
from megatrain.optim.preferences import DirectPreference, PairReward

OBJECTIVES: dict[str, Callable[[TrainConfig], Objective]] = {
    "pretrain": lambda config: NextToken(config.method.label_smoothing),
    "distill": lambda config: Distillation(
        config.method.teacher_weight, config.method.temperature, config.method.reverse
    ),
    "sft": lambda config: NextToken(config.method.label_smoothing),
    "reward": lambda config: PairReward(config.method.margin, config.method.centering),
    "dpo": lambda config: DirectPreference(config.method.beta, config.method.label_smoothing, config.method.sft_weight),
    "grpo": lambda config: policy_gradient(config.method),
    "ppo": lambda config: policy_gradient(config.method),
}
"""How each method's objective is made of the config."""


def objective_of(config: TrainConfig) -> Objective:
    """Return the objective that `method.name` trains with."""
    return OBJECTIVES[config.method.name](config)

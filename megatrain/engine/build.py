"""Build the engine that the config names. Only this module imports all engines."""

from __future__ import annotations

from megatrain.config import TrainConfig
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine
from megatrain.optim.objective import Objective
from megatrain.optim.objectives import objective_of


def build_engine(config: TrainConfig, world: World, objective: Objective | None = None) -> Engine:
    """Return the engine that `engine.name` names. Initial parameters are bit-identical in every layout.

    The engine minimises `objective`, by default that of `method.name`.
    """
    objective = objective or objective_of(config)
    if config.engine.name == "native":
        from megatrain.engine.native import NativeEngine

        return NativeEngine(config, world, objective)
    from megatrain.engine.deepspeed import DeepSpeedEngine  # importing it takes seconds

    return DeepSpeedEngine(config, world, objective)

"""Build the engine that the config names. This is the only module that knows all engines."""

from __future__ import annotations

from megatrain.config import TrainConfig
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine
from megatrain.optim.objective import NextToken, Objective


def build_engine(config: TrainConfig, world: World, objective: Objective | None = None) -> Engine:
    """Return the engine of `engine.name`, its parameters initialised bit-equal in every layout.

    It minimises `objective`, by default next-token prediction.
    """
    objective = objective or NextToken()
    if config.engine.name == "native":
        from megatrain.engine.native import NativeEngine

        return NativeEngine(config, world, objective)
    from megatrain.engine.deepspeed import DeepSpeedEngine  # importing it takes seconds

    return DeepSpeedEngine(config, world, objective)

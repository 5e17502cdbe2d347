"""Chooses the engine that the config names. The only place that knows all of them."""

from __future__ import annotations

from megatrain.config import TrainConfig
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine


def build_engine(config: TrainConfig, world: World) -> Engine:
    """The engine of `engine.name`, its parameters initialised, bit-equal in every layout."""
    if config.engine.name == "native":
        from megatrain.engine.native import NativeEngine

        return NativeEngine(config, world)
    from megatrain.engine.deepspeed import DeepSpeedEngine  # importing it costs seconds

    return DeepSpeedEngine(config, world)

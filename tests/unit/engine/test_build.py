"""The engine that `engine.name` names is built, with the objective that it is given."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from megatrain.config import EngineConfig, TrainConfig
from megatrain.engine import native
from megatrain.engine.build import build_engine
from megatrain.optim.objective import NextToken


class Recorder:
    def __init__(self, config, world, objective):
        self.given = config, world, objective


@pytest.fixture
def engines(monkeypatch):
    """Both engines replaced: what is tested is the choice."""
    made = {name: type(name, (Recorder,), {}) for name in ("native", "deepspeed")}
    monkeypatch.setattr(native, "NativeEngine", made["native"])
    fake = SimpleNamespace(DeepSpeedEngine=made["deepspeed"])
    monkeypatch.setitem(sys.modules, "megatrain.engine.deepspeed", fake)
    return made


@pytest.mark.parametrize("name", ["native", "deepspeed"])
def test_the_engine_is_the_named_one(engines, name):
    config, world, objective = TrainConfig(engine=EngineConfig(name=name)), object(), object()
    engine: Any = build_engine(config, world, objective)
    assert type(engine) is engines[name] and engine.given == (config, world, objective)


def test_the_objective_is_next_token_prediction_unless_given(engines):
    engine: Any = build_engine(TrainConfig(engine=EngineConfig(name="native")), object())
    assert isinstance(engine.given[2], NextToken)

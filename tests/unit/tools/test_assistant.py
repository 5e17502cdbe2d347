"""The commands of tools/assistant.py: each is one that megatrain takes, and together they are a chain."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatrain import cli
from megatrain.config.compose import compose

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
from assistant_stages import stages

MADE_FROM = {
    **{"sft": "toy-base", "styles": "toy-base", "reward": "toy-sft"},
    **{"dpo": "toy-styles", "grpo": "toy-styles", "int8": "toy-grpo"},
}


@pytest.mark.parametrize("stage", [stage for stage in stages({}) if stage.commands], ids=lambda stage: stage.name)
def test_each_command_is_composed_and_begins_from_an_earlier_stage(stage):
    for words in stage.commands:
        arguments = cli.parse(list(words))
        config = compose(arguments.verb, arguments.overrides)
        if arguments.verb in ("tune", "compress"):
            assert config.path == f"runs/{MADE_FROM[stage.name]}"
        if arguments.verb in ("train", "tune"):
            assert config.run.name == f"toy-{stage.name}" and config.tracking.register


def test_further_words_go_to_their_stage_or_to_all_runs():
    listed = {stage.name: stage.commands[0] for stage in stages({"sft": ["seed=1"], "all": ["tracking=none"]})}
    assert listed["sft"][-2:] == ["seed=1", "tracking=none"]
    assert listed["base"][-1] == "tracking=none" and "seed=1" not in listed["base"]
    assert "tracking=none" not in listed["data"]

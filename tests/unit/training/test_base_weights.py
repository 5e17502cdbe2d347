"""A run that compares with the weights it began from takes those alone: its base may go on, be retired, or change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.jobs import job
from support.records import at

from megatrain.checkpoint.manifest import Identity, read_manifest
from megatrain.checkpoint.naming import checkpoint_name
from megatrain.checkpoint.store import CheckpointStore, write
from megatrain.config import TrainConfig
from megatrain.distributed.world import World
from megatrain.engine.build import build_engine
from megatrain.errors import CheckpointError
from megatrain.training.base_weights import RECORD, BaseWeights
from megatrain.training.origin import Origin


class Place:
    """A base with a checkpoint of step 4, and a run that began from it and is resumed at step 2."""

    def __init__(self, folder: Path) -> None:
        self.world = World(0, 1, 0, torch.device("cpu"), None)
        self.base, self.config = folder / "base" / "checkpoints", job("native", zero=0)
        self.save(4, seed=4)
        self.config.checkpoint.init_from = str(folder / "base")
        self.store = CheckpointStore(folder / "run" / "checkpoints", self.world)
        self.engine = build_engine(self.config, self.world)
        began = BaseWeights(self.config, self.engine, self.world, self.store, None)
        self.load(4)
        self.record = began.restored(None)
        own = self.store.save(self.state(seed=9) | {RECORD: self.record}, at(2))
        self.resumed = Origin(own, read_manifest(own), resumes=True)

    def state(self, seed: int) -> dict[str, torch.Tensor]:
        changed = TrainConfig(**{**vars(self.config), "seed": seed})
        return {name: value.clone() for name, value in build_engine(changed, self.world).state().items()}

    def save(self, step: int, seed: int) -> None:
        folder = self.base / checkpoint_name(step)
        folder.mkdir(parents=True)
        write(folder, self.state(seed), at(step, identity=Identity({"model": vars(self.config.model)})), None)

    def load(self, seed: int) -> None:
        for name, value in self.engine.state().items():
            value.copy_(self.state(seed)[name])

    def again(self) -> torch.Tensor:
        """Return the record that the resumed run finds, with another engine's weights in its place."""
        self.load(7)
        weights = BaseWeights(self.config, self.engine, self.world, self.store, self.resumed)
        return weights.restored(weights.recorded())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_weights_of_the_start_are_loaded_though_the_base_has_gone_on(place: Place) -> None:
    place.save(8, seed=8)
    assert torch.equal(place.again(), place.record)
    expected = place.state(seed=4)
    assert all(torch.equal(value, expected[name]) for name, value in place.engine.state().items())


def test_a_base_whose_checkpoint_is_gone_or_changed_is_refused(place: Place) -> None:
    place.save(8, seed=8)
    shutil.rmtree(place.base / checkpoint_name(4))
    with pytest.raises(CheckpointError, match=r"step_00000004 is gone, whose weights this run began from"):
        place.again()
    place.save(4, seed=5)
    with pytest.raises(CheckpointError, match=r"step_00000004 does not give the weights that this run began from"):
        place.again()


def test_drawn_weights_are_drawn_again(place: Place) -> None:
    place.config.checkpoint.init_from = None
    fresh = build_engine(place.config, place.world)
    record = BaseWeights(place.config, fresh, place.world, place.store, None).restored(None)
    assert record[1] == -1 and record[0] != place.record[0]


def test_a_checkpoint_that_does_not_say_which_weights_is_refused(place: Place) -> None:
    own = place.store.save(place.state(seed=9), at(3))
    place.resumed = Origin(own, read_manifest(own), resumes=True)
    with pytest.raises(CheckpointError, match="does not say which weights the run began from"):
        place.again()

"""What a run compares with of the weights that it began from: log-probabilities of its pairs, or the whole model.

Checkpoints record which weights those are. So a run that resumes refuses others: its base may have gone on since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.naming import checkpoint_name
from megatrain.checkpoint.store import CheckpointStore, load_into
from megatrain.checkpoint.weights import plan_transfer
from megatrain.config import SAMPLING, TrainConfig
from megatrain.distributed.world import World
from megatrain.engine.protocol import Engine
from megatrain.engine.whole_model import WholeModel, weights_checksum
from megatrain.errors import CheckpointError
from megatrain.model.count import adapter_shapes, parameter_shapes
from megatrain.model.gpt import GPT
from megatrain.optim.objective import Objective
from megatrain.optim.preferences import DirectPreference
from megatrain.training.datasets import RunData
from megatrain.training.origin import Origin, base_of, checkpoint_at, load_origin
from megatrain.training.reference import Reference

RECORD = "buffer.reference"
"""The name of what a checkpoint says of the weights, int64 `[2]`: their checksum, and the step that they are from."""

DRAWN = -1
"""The step of weights that were drawn, not loaded."""


@dataclass(frozen=True)
class Compared:
    """What a run compares with: a `model`, or what its objective was given.

    `kept` goes into every checkpoint; `detail` is what the event `reference` says, empty if there is none.
    """

    model: GPT | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseWeights:
    """The weights that a run began from. `resumed` is the checkpoint that it continues; None for a run that begins."""

    config: TrainConfig
    engine: Engine
    world: World
    store: CheckpointStore
    resumed: Origin | None

    def recorded(self) -> Tensor | None:
        """Return what the checkpoint says of the weights; None for a run that begins, and for checkpoints of old."""
        if self.resumed is None or RECORD not in self.resumed.manifest.tensors:
            return None
        record = torch.empty(2, dtype=torch.int64)
        load_into(self.resumed.folder, self.resumed.manifest, {RECORD: record}, self.resumed.node or self.world)
        return record

    def restored(self, record: Tensor | None) -> Tensor:
        """Make sure that the engine holds the weights, and return their record. A run that begins holds them already.

        The engine's own weights must be loaded afterwards.

        Raises:
            CheckpointError: the weights are gone or were changed.
        """
        base = base_of(self.config, self.store)
        if self.resumed is None:
            return self._measured(base)
        if record is None:
            raise CheckpointError(
                f"{self.resumed.folder} does not say which weights the run began from, which it compares with; begin "
                "another run.name"
            )
        if base is not None:
            if base.manifest.step != record[1]:  # the run that it is of has gone on
                base = checkpoint_at(base.folder.parent / checkpoint_name(int(record[1])), self.world)
            taken = plan_transfer(base.folder, base.manifest, self.config.model, self.config.checkpoint.override).taken
            load_origin(base, self.engine, self.world, taken)
        found = self._measured(base)
        if not torch.equal(record, found):
            raise CheckpointError(
                f"{base.folder if base else f'seed={self.config.seed}'} does not give the weights that this run began "
                "from and compares with; put them back, or begin another run.name"
            )
        return found

    def _measured(self, base: Origin | None) -> Tensor:
        """Return the record of the engine's weights."""
        shapes = parameter_shapes(self.config.model) | adapter_shapes(self.config.model, self.config.method.lora)
        checksum = weights_checksum(self.engine.state(), shapes, self.world)
        return torch.tensor([checksum, base.manifest.step if base else DRAWN])


def compare_with_base(weights: BaseWeights, objective: Objective, data: RunData, run_dir: Path) -> Compared:
    """Return what a run compares with, and give an objective over pairs its reference; nothing for other methods.

    If the run begins, the engine must hold the weights that it begins from. If it resumes, its own are loaded later.
    All ranks must call it.

    Raises:
        CheckpointError: the weights that the run began from are needed, and are gone or were changed.
    """
    if isinstance(objective, DirectPreference):
        return _pairs(weights, objective, Reference(data, weights.world, run_dir))
    if weights.config.method.name in SAMPLING and weights.config.method.kl:
        record = weights.restored(weights.recorded())
        whole = WholeModel(weights.config, weights.world)
        whole.take(weights.engine.state(), shares=False)
        return Compared(whole.model, {RECORD: record})
    return Compared()


def _pairs(weights: BaseWeights, objective: DirectPreference, reference: Reference) -> Compared:
    """Give the objective what the run kept of its reference, or computes from the base's weights if that is lost."""
    record = weights.recorded() if weights.resumed else weights.restored(None)
    found = reference.find(None if record is None else int(record[0]), begins=weights.resumed is None)
    detail = {"pairs": reference.num_pairs, "computed": found is None}
    if found is None:
        record = weights.restored(record)
        found = reference.compute(weights.engine, objective.reference, int(record[0]))
    objective.reference.log_probs = found
    return Compared(kept={} if record is None else {RECORD: record}, detail=detail)

"""Give a run that distils its teacher: a second model, whole on each rank that computes losses, which never changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain import errors
from megatrain.checkpoint.lineage import find_line, line_of
from megatrain.checkpoint.manifest import Ancestor, decode
from megatrain.checkpoint.store import load_into
from megatrain.checkpoint.teacher import KEY, check_teacher
from megatrain.config import ModelConfig, TrainConfig
from megatrain.distributed.world import World
from megatrain.engine.common import DTYPES, choose_kernels
from megatrain.errors import CheckpointError, MegatrainError
from megatrain.interop.path_kind import kind_of
from megatrain.interop.source import Source, open_source
from megatrain.model.count import num_parameters, parameter_shapes
from megatrain.model.gpt import GPT
from megatrain.optim.distillation import Distillation
from megatrain.optim.objective import Objective
from megatrain.parallel.context import split_sequences
from megatrain.parallel.layout import Layout
from megatrain.parallel.mesh import make_groups
from megatrain.training.datasets import RunData
from megatrain.training.origin import Origin

RECORD = "buffer.teacher"
"""The name of what a checkpoint says of the teacher, int64 `[2]`: a checksum of its files, and its step."""


@dataclass(frozen=True)
class Taught:
    """What a run records of its teacher; empty if it has none.

    `kept` goes into every checkpoint; `line` are the models that the teacher came from, and the teacher itself;
    `detail` is what the event `teacher` says.
    """

    kept: Mapping[str, Tensor] = field(default_factory=dict)
    line: list[Ancestor] = field(default_factory=list)
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    """What all ranks know of a teacher. `tokenizer` is the fingerprint, None if unknown; `record` as in `RECORD`."""

    folder: str
    model: ModelConfig
    tokenizer: str | None
    record: list[int]
    line: list[Ancestor]


def give_teacher(data: RunData, world: World, objective: Objective, resumed: Origin | None) -> Taught:
    """Give an objective that distils its teacher; nothing for others. `resumed` is the checkpoint that a run continues.

    Rank 0 reads the teacher, and each rank with an output head keeps it whole, in the run's precision. All ranks must
    call it.

    Raises:
        ConfigError: there is no such model, or its probabilities are of other tokens.
        CheckpointError: it is damaged, or not the teacher that the run began with.
    """
    if not isinstance(objective, Distillation):
        return Taught()
    config = data.config
    record: Tensor | None = None
    if resumed is not None:
        record = torch.empty(2, dtype=torch.int64)
        load_into(resumed.folder, resumed.manifest, {RECORD: record}, resumed.node or world)
    found, source = _find(Path(str(config.method.teacher)), world, None if record is None else int(record[1]))
    check_teacher(Path(found.folder), found.model, found.tokenizer, config, data.card)
    now = torch.tensor(found.record)
    if record is not None and record[0] != now[0]:
        raise CheckpointError(
            f"{KEY}={found.folder} does not hold the weights that this run began to learn from; put them back, or "
            "begin another run.name"
        )
    objective.teacher = send_teacher(found.model, source, config, world)
    return Taught({RECORD: now}, found.line, {"model": found.folder, "parameters": num_parameters(found.model)})


def _find(path: Path, world: World, step: int | None) -> tuple[_Found, Source | None]:
    """Return the teacher, whose weights only rank 0 has: of a run, the checkpoint of `step`, or the newest.

    `step` is 0 for a model without one. All ranks raise what rank 0 does.
    """
    source: Source | None = None
    answer: dict[str, Any] = {}
    if world.is_main:
        try:
            source = open_source(path, step if step and kind_of(path) == "run" else None)
            answer = asdict(_described(source))
        except MegatrainError as error:
            answer = {"error": type(error).__name__, "text": f"{KEY}: {error}"}
    answer = world.all_gather_json(answer)[0]
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["text"])
    found: _Found = decode(_Found, answer, KEY)
    return found, source


def _described(source: Source) -> _Found:
    folder, manifest = source.folder, source.manifest
    line = line_of(folder, manifest) if manifest else find_line(folder)
    if not line:  # a folder of other software
        line = [Ancestor(folder.name, "import", str(folder), source.fingerprint, imported_from=str(folder))]
    return _Found(
        str(folder),
        source.config,
        source.tokenizer.fingerprint if source.tokenizer else None,
        [int(source.fingerprint[:15], 16), source.step or 0],
        line,
    )


@torch.no_grad()
def send_teacher(model: ModelConfig, source: Source | None, config: TrainConfig, world: World) -> GPT | None:
    """Return the teacher on this rank's device; None if this rank has no head. Sent from rank 0 one tensor at a time.

    Context ranks run it on their slices of the sequences, as they do the student.
    """
    layout = Layout.of(config, world.size)
    place = layout.coordinate(world.rank)
    group = make_groups(layout, world.rank, world.device).cp if layout.cp > 1 else None
    teacher: GPT | None = None
    if layout.num_stages - 1 in layout.stages_of(place.pp):
        kernels = choose_kernels(replace(config, model=model, compile=False), world.device)
        with torch.device("meta"):
            teacher = GPT(model, kernels).to(DTYPES[config.precision.name])
        teacher = teacher.to_empty(device=world.device).eval().requires_grad_(False)
        if group is not None:
            split_sequences(teacher, layout.cp_kind, group)
    parameters = dict(teacher.named_parameters()) if teacher is not None else {}
    for name, shape in parameter_shapes(model).items():
        world.heartbeat.enter("load")
        values = torch.zeros(shape, device=world.device)
        if source is not None:
            values.copy_(source.read(name))
        world.all_reduce_sum(values)
        if teacher is not None:
            parameters[name].copy_(values)
    return teacher

"""How a job is split: the axes of its ranks, their sizes, and each rank's coordinate. Imports no torch.

To add an axis, add a field to `Coordinate`, which orders the axes, and one to `Layout`, which holds their sizes. Grids,
process groups and the planner's groups follow from these. rules.py says what may be combined; stages.py assigns layers
to stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple

from megatrain.config import TrainConfig, TrainLoopConfig
from megatrain.optim.schedule import batch_sizes
from megatrain.parallel.grid import Grid
from megatrain.parallel.stages import ZERO_BUBBLE, stage_layers, stages_of


class Coordinate(NamedTuple):
    """A rank's index on each axis, outermost axis first.

    Tensor ranks are innermost, so that a tensor group stays within a node. Pipeline ranks are outermost, because they
    communicate least.
    """

    pp: int = 0
    dp: int = 0
    cp: int = 0
    tp: int = 0


DEGREES = tuple(axis for axis in reversed(Coordinate._fields) if axis != "dp")
"""The axes whose size a config gives, as `parallel.<axis>`. Data parallelism gets the remaining ranks."""


@dataclass(frozen=True)
class Layout:
    """How a job is split. `dp` is the data-parallel degree: the world size divided by all other degrees."""

    coordinate_type: ClassVar[type[Coordinate]] = Coordinate

    world_size: int
    dp: int
    cp: int
    tp: int
    pp: int
    zero: int
    dp_replicate: int
    schedule: str
    virtual_stages: int
    cp_kind: str
    engine: str
    precision: str

    @classmethod
    def of(cls, config: TrainConfig, world_size: int) -> Layout:
        """Return the layout of a config on `world_size` ranks."""
        parallel = config.parallel
        degrees: dict[str, int] = {axis: getattr(parallel, axis) for axis in DEGREES}
        return cls(
            world_size=world_size,
            dp=data_parallel_degree(world_size, degrees.values()),
            zero=parallel.zero,
            dp_replicate=parallel.dp_replicate,
            schedule=parallel.schedule,
            virtual_stages=parallel.virtual_stages,
            cp_kind=parallel.cp_kind,
            engine=config.engine.name,
            precision=config.precision.name,
            **degrees,
        )

    @property
    def grid(self) -> Grid:
        """The ranks along the axes of `Coordinate`."""
        return Grid({axis: getattr(self, axis) for axis in self.coordinate_type._fields})

    @property
    def sharding_grid(self) -> Grid:
        """The ranks with `dp` and `cp` replaced by `replicate` and `shard`.

        Data and context ranks hold the same parameters, so ZeRO shards over both at once.
        """
        sizes = {"replicate": self.dp_cp_size // self.num_shards, "shard": self.num_shards}
        return self.grid.regrouped(("dp", "cp"), sizes)

    def coordinate(self, rank: int) -> Coordinate:
        """Return a rank's index on each axis."""
        return self.coordinate_type(**self.grid.coordinate(rank))

    def rank(self, place: Coordinate) -> int:
        """Return the rank at a coordinate."""
        return self.grid.rank(place._asdict())

    def dp_rank(self, rank: int) -> int:
        """Return which share of the samples a rank reads."""
        return self.coordinate(rank).dp

    @property
    def dp_cp_size(self) -> int:
        """Ranks that hold the same parameters: data-parallel ranks differ in samples, context ranks in tokens."""
        return self.dp * self.cp

    def dp_cp_rank(self, rank: int) -> int:
        """Return a rank's index among those that hold the same parameters: which share of the tokens it works on."""
        place = self.coordinate(rank)
        return place.dp * self.cp + place.cp

    @property
    def readers(self) -> list[int]:
        """The first rank that reads each share of the samples."""
        return [self.rank(self.coordinate_type(dp=dp)) for dp in range(self.dp)]

    @property
    def num_shards(self) -> int:
        """Ranks over which ZeRO shards one copy of the states: 1 at ZeRO 0."""
        return self.dp_cp_size // self.dp_replicate if self.zero else 1

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the whole job."""
        return self.pp * self.virtual_stages

    def stages_of(self, pp_rank: int) -> list[int]:
        """Return the stages that a pipeline rank holds, in model order."""
        return stages_of(self.schedule, self.pp, self.virtual_stages, pp_rank)

    def pp_rank_of(self, stage: int) -> int:
        """Return the pipeline rank that holds a stage."""
        return next(pp for pp in range(self.pp) if stage in self.stages_of(pp))

    def micro_batches(self, loop: TrainLoopConfig) -> list[int]:
        """Return the micro-batches per rank and step, for each batch size of the run, including the ramp's."""
        return [num_micro_batches(size, loop.micro_batch_size, self.dp) for size in batch_sizes(loop)]

    def describe(self) -> str:
        """Return one line for logs and tags, with the degrees above 1."""
        degrees = [f"{axis}={getattr(self, axis)}" for axis in DEGREES if getattr(self, axis) > 1]
        parts = [self.engine, f"dp={self.dp}", *degrees, f"zero={self.zero}", self.precision]
        if self.pp > 1:
            parts.insert(-1, self.schedule + (f" x {self.virtual_stages}" if self.virtual_stages > 1 else ""))
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values for a manifest."""
        return asdict(self)


def data_parallel_degree(world_size: int, degrees: Iterable[int]) -> int:
    """Return the world size divided by the other degrees, at least 1."""
    return max(1, world_size // prod(degrees))


def num_micro_batches(batch_size: int, micro_batch_size: int, dp: int) -> int:
    """Return the micro-batches per rank in a step of `batch_size` sequences over all ranks."""
    return batch_size // (micro_batch_size * dp)


def describe(config: TrainConfig, layout: Layout) -> str:
    """Return a job's layout on one line, with the number of blocks in each pipeline stage."""
    if layout.pp == 1:
        return layout.describe()
    counts = "+".join(str(len(layers)) for layers in stage_layers(config, layout.num_stages))
    return f"{layout.describe()} (blocks {counts})"


def head_in_chunks(config: TrainConfig, layout: Layout) -> bool:
    """Return whether head, loss and their gradients are computed together, a chunk of tokens at a time.

    That is impossible with a vocabulary cut over ranks or a schedule that splits the backward pass.
    """
    split = layout.pp > 1 and layout.schedule in ZERO_BUBBLE
    return config.kernels != "reference" and layout.tp == 1 and not split

"""Every layout that a number of ranks allows: all combinations of the axes, each checked against the table of rules.py.

`megatrain layouts` lists them; tests/measure/parity_grid.py compares them with one process. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

from megatrain.config import TrainConfig
from megatrain.config.arithmetic import divisors
from megatrain.parallel.rules import Refusal, refusal

SCHEDULES = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_zero_bubble", 2),
    ("zbv_zero_bubble", 2),
)
"""Pipeline schedules, each with the number of virtual stages to try."""


class Candidate(NamedTuple):
    """One combination of the axes. At pp=1 the pipeline keys have no effect, nor has `cp_kind` at cp=1."""

    engine: str
    zero: int
    tp: int
    pp: int
    cp: int
    recompute: str
    schedule: str
    virtual_stages: int
    cp_kind: str
    dp_replicate: int

    def apply(self, config: TrainConfig) -> None:
        """Write the candidate into a config."""
        config.engine.name, config.train.recompute = self.engine, self.recompute
        parallel = config.parallel
        parallel.zero, parallel.tp, parallel.pp, parallel.cp = self.zero, self.tp, self.pp, self.cp
        parallel.schedule, parallel.virtual_stages = self.schedule, self.virtual_stages
        parallel.cp_kind, parallel.dp_replicate = self.cp_kind, self.dp_replicate


@dataclass(frozen=True)
class Axes:
    """The values to try on each axis; None means every divisor of the number of ranks."""

    engines: tuple[str, ...] = ("native", "deepspeed")
    zeros: tuple[int, ...] = (0, 1, 2, 3)
    tps: tuple[int, ...] | None = None
    pps: tuple[int, ...] | None = None
    cps: tuple[int, ...] | None = None
    recomputes: tuple[str, ...] = ("none", "selective", "full")
    schedules: tuple[tuple[str, int], ...] = SCHEDULES
    without_pipeline: tuple[tuple[str, int], ...] = (("1f1b", 1),)
    cp_kinds: tuple[str, ...] = ("ulysses", "ring")
    replicas: tuple[int, ...] | None = None

    def candidates(self, world_size: int) -> Iterator[Candidate]:
        """Yield the distinct combinations, legal or not."""
        every = list(product(*(values or divisors(world_size) for values in (self.tps, self.pps, self.cps))))
        fitting = [degrees for degrees in every if world_size % prod(degrees) == 0]
        degrees = fitting or every[:1]  # where none fits, the first is refused with a message
        for engine, zero, (tp, pp, cp), recompute in product(self.engines, self.zeros, degrees, self.recomputes):
            schedules = self.schedules if pp > 1 else self.without_pipeline
            kinds = self.cp_kinds if cp > 1 else self.cp_kinds[:1]
            for (schedule, virtual), kind in product(schedules, kinds):
                for replicas in self._replicas(world_size // (tp * pp * cp), engine, zero):
                    yield Candidate(engine, zero, tp, pp, cp, recompute, schedule, virtual, kind, replicas)

    def _replicas(self, dp: int, engine: str, zero: int) -> tuple[int, ...]:
        """Return the numbers of replicas to try; native hybrid sharding needs at least two shards in each."""
        if self.replicas is not None:
            return self.replicas
        return (1, *divisors(dp)[1:-1]) if zero and engine == "native" else (1,)


def judge(config: TrainConfig, world_size: int, axes: Axes) -> Iterator[tuple[Candidate, Refusal | None, TrainConfig]]:
    """Yield each candidate, the row that refuses it or None, and the job's config with the candidate written in.

    All items share one config object, a copy of the given one, which the next item overwrites.
    """
    config = deepcopy(config)
    for candidate in axes.candidates(world_size):
        candidate.apply(config)
        yield candidate, refusal(config, world_size), config

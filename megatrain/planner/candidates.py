"""Every layout that a number of ranks allows: the axes multiplied out, and each combination judged by the table of layout.py.

`megatrain layouts` lists them, tests/measure/parity_grid.py compares them with one process. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

from megatrain.config import TrainConfig
from megatrain.parallel.rule_checks import divisors
from megatrain.parallel.rules import Refusal, refusal

SCHEDULES = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_zero_bubble", 2),
    ("zbv_zero_bubble", 2),
)
"""Pipeline schedules with the virtual stages that are tried with them."""


class Candidate(NamedTuple):
    """One combination of the axes. Without a pipeline or context ranks their keys stand at values that mean nothing."""

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
        """Write it into a config."""
        config.engine.name, config.train.recompute = self.engine, self.recompute
        parallel = config.parallel
        parallel.zero, parallel.tp, parallel.pp, parallel.cp = self.zero, self.tp, self.pp, self.cp
        parallel.schedule, parallel.virtual_stages = self.schedule, self.virtual_stages
        parallel.cp_kind, parallel.dp_replicate = self.cp_kind, self.dp_replicate


@dataclass(frozen=True)
class Axes:
    """The values that each axis takes; None means every one that the ranks can be divided by."""

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
        """The combinations that differ from one another, legal or not."""
        every = list(product(*(values or divisors(world_size) for values in (self.tps, self.pps, self.cps))))
        degrees = [degree for degree in every if world_size % prod(degree) == 0] or every[
            :1
        ]  # or nothing could be said
        for engine, zero, (tp, pp, cp), recompute in product(self.engines, self.zeros, degrees, self.recomputes):
            schedules = self.schedules if pp > 1 else self.without_pipeline
            kinds = self.cp_kinds if cp > 1 else self.cp_kinds[:1]
            for (schedule, virtual), kind in product(schedules, kinds):
                for replicas in self._replicas(world_size // (tp * pp * cp), engine, zero):
                    yield Candidate(engine, zero, tp, pp, cp, recompute, schedule, virtual, kind, replicas)

    def _replicas(self, dp: int, engine: str, zero: int) -> tuple[int, ...]:
        """Numbers of groups for hybrid sharding: all that leave a group something to shard, where an engine has it."""
        if self.replicas is not None:
            return self.replicas
        return (1, *divisors(dp)[1:-1]) if zero and engine == "native" else (1,)


def judge(config: TrainConfig, world_size: int, axes: Axes) -> Iterator[tuple[Candidate, Refusal | None, TrainConfig]]:
    """Each candidate with the row that refuses it, or None, and the job's config with it written in.

    The config is one and the same object each time, a copy of the one given.
    """
    config = deepcopy(config)
    for candidate in axes.candidates(world_size):
        candidate.apply(config)
        yield candidate, refusal(config, world_size), config

"""World size to axes, and THE TABLE of what combines: legal, or refused with the reason and the nearest legal change.

Plain data, checked without torch; the engines trust it, and messages, tests and docs are made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megatrain.config import TrainConfig
from megatrain.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """How a job is split. `dp` is the data-parallel degree: the world divided by all other degrees."""

    world_size: int
    dp: int
    zero: int
    engine: str
    precision: str

    @classmethod
    def of(cls, config: TrainConfig, world_size: int) -> Layout:
        """The layout that a config and a number of ranks make."""
        return cls(world_size, world_size, config.parallel.zero, config.engine.name, config.precision.name)

    def data_rank(self, rank: int) -> int:
        """Which share of the data a rank reads."""
        return rank % self.dp

    def describe(self) -> str:
        """One line for logs and tags."""
        return f"{self.engine} dp={self.dp} zero={self.zero} {self.precision}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Refusal:
    """One row of the table: a combination that is refused, why, and what to change."""

    name: str
    applies: Callable[[TrainConfig, int], bool]
    message: str

    def text(self, config: TrainConfig, world_size: int) -> str:
        """The message with this job's values in it."""
        return self.message.format(config=config, world_size=world_size)


def _is_low(config: TrainConfig) -> bool:
    return config.precision.name != "fp32"


REFUSALS = (
    Refusal(
        "native_many_ranks",
        lambda config, world_size: config.engine.name == "native" and world_size > 1,
        "engine=native runs on one process so far, the job has {world_size}; use engine=deepspeed",
    ),
    Refusal(
        "fp32_low_sums",
        lambda config, _: (
            config.precision.name == "fp32"
            and (config.precision.accumulate_dtype, config.precision.reduce_dtype) != ("fp32", "fp32")
        ),
        "precision=fp32 sums and reduces gradients in fp32; precision.accumulate_dtype={config.precision.accumulate_dtype} "
        "and precision.reduce_dtype={config.precision.reduce_dtype} need precision=bf16 or fp16",
    ),
    Refusal(
        "foreign_accumulate_dtype",
        lambda config, _: _is_low(config) and config.precision.accumulate_dtype not in ("fp32", config.precision.name),
        "precision.accumulate_dtype={config.precision.accumulate_dtype} does not go with precision={config.precision.name}; "
        "use fp32 or {config.precision.name}",
    ),
    Refusal(
        "foreign_reduce_dtype",
        lambda config, _: _is_low(config) and config.precision.reduce_dtype not in ("fp32", config.precision.name),
        "precision.reduce_dtype={config.precision.reduce_dtype} does not go with precision={config.precision.name}; "
        "use fp32 or {config.precision.name}",
    ),
    Refusal(
        "deepspeed_zero0_fp32_accumulation",
        lambda config, _: (
            config.engine.name == "deepspeed"
            and config.parallel.zero == 0
            and _is_low(config)
            and config.precision.accumulate_dtype == "fp32"
        ),
        "DeepSpeed cannot accumulate {config.precision.name} gradients in fp32 at parallel.zero=0; use parallel.zero=1 "
        "(the same memory on one rank, less on more), or precision.accumulate_dtype={config.precision.name}",
    ),
    Refusal(
        "deepspeed_zero0_fp16",
        lambda config, _: (
            config.engine.name == "deepspeed" and config.parallel.zero == 0 and config.precision.name == "fp16"
        ),
        "DeepSpeed's unsharded fp16 optimizer does not scale the loss it is given; use parallel.zero=1 or precision=bf16",
    ),
    Refusal(
        # measured on a 2-block model: 11 graph fragments, torch's recompile limit hit, losses bit-equal to uncompiled
        "deepspeed_zero3_compile",
        lambda config, _: config.compile and config.engine.name == "deepspeed" and config.parallel.zero == 3,
        "compile=true does nothing under DeepSpeed at parallel.zero=3, whose hooks split every block into fragments; use "
        "parallel.zero=2, or compile=false",
    ),
)
"""The refused rows, the first that applies speaking. Everything else is legal."""


def refusal(config: TrainConfig, world_size: int) -> Refusal | None:
    """The row that refuses a job, or None where it is legal."""
    return next((row for row in REFUSALS if row.applies(config, world_size)), None)


def check(config: TrainConfig, world_size: int) -> None:
    """Refuse an illegal combination.

    Raises:
        ConfigError: with the reason and the nearest legal change.
    """
    if row := refusal(config, world_size):
        raise ConfigError(row.text(config, world_size))

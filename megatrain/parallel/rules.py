"""The table of what cannot be combined, as data. Everything else is legal. Imports no torch.

Each row names a combination, says why it is refused and what to change. Messages, tests and a page of the docs are
generated from the table, and the engines rely on it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import lcm, prod
from typing import Any

from megatrain.config import TrainConfig
from megatrain.config.arithmetic import divisors, either, nearest
from megatrain.errors import ConfigError
from megatrain.optim.schedule import batch_sizes
from megatrain.parallel import rule_checks
from megatrain.parallel.layout import DEGREES, Layout
from megatrain.parallel.stages import ZERO_BUBBLE

Condition = Callable[[Any], bool]


def above(limit: float) -> Condition:
    """Return the condition that a value is larger than `limit`."""
    return partial(operator.lt, limit)


def other_than(value: object) -> Condition:
    """Return the condition that a value is not this one."""
    return partial(operator.ne, value)


def one_of(values: tuple[object, ...]) -> Condition:
    """Return the condition that a value is among these."""
    return values.__contains__


class Combination:
    """A check that refuses a job if every key of `when` has the given value or meets the given condition.

    `message` is a format string over the config, as in `{parallel.tp}`.
    """

    def __init__(self, when: Mapping[str, object], message: str) -> None:
        self.conditions: list[tuple[Callable[[TrainConfig], Any], Condition]] = [
            (operator.attrgetter(key), wanted if callable(wanted) else partial(operator.eq, wanted))
            for key, wanted in when.items()
        ]
        self.message = message

    def __call__(self, config: TrainConfig, _: int) -> str | None:
        """Return the message if the combination applies, else None."""
        for value_of, condition in self.conditions:
            if not condition(value_of(config)):
                return None
        return self.message.format_map(vars(config))


@dataclass(frozen=True)
class Refusal:
    """One row of the table: a combination that is refused, why, and what to change.

    `check(config, world_size)` returns the message if the row applies, else None. `summary` is for the docs. `degrees`
    names the keys of `parallel` another value of which may be what was meant.
    """

    name: str
    summary: str
    check: Callable[[TrainConfig, int], str | None]
    degrees: tuple[str, ...] = ()


SPLIT_BACKWARD: dict[str, object] = {"parallel.pp": above(1), "parallel.schedule": one_of(ZERO_BUBBLE)}

REFUSALS = (
    Refusal(
        "world_does_not_factor", "a number of ranks not divisible by tp x cp x pp", rule_checks.world_size, DEGREES
    ),
    Refusal(
        "deepspeed_pipeline",
        "a pipeline under engine=deepspeed: its PipelineModule refuses ZeRO 2 and 3",
        Combination(
            {"engine.name": "deepspeed", "parallel.pp": above(1)},
            "parallel.pp={parallel.pp} needs engine=native",
        ),
    ),
    Refusal(
        "low_rank_deepspeed_tensor",
        "low-rank layers (method.lora) with DeepSpeed's tensor ranks, whose layers compute a product of one weight",
        Combination(
            {"engine.name": "deepspeed", "parallel.tp": above(1), "method.lora.rank": above(0)},
            "method.lora.rank={method.lora.rank} with parallel.tp={parallel.tp} needs engine=native: AutoTP's layers "
            "have no low-rank layers; or use parallel.tp=1",
        ),
    ),
    Refusal(
        "low_rank_offload",
        "low-rank layers with offload, which moves states of trained weights alone",
        Combination(
            {"engine.offload": other_than("none"), "method.lora.rank": above(0)},
            "engine.offload={engine.offload} saves little with method.lora.rank={method.lora.rank}, whose states are "
            "small, and was not tried with it; use engine.offload=none",
        ),
    ),
    Refusal(
        "low_rank_tensor_dropout",
        "dropout of low-rank layers with tensor parallelism: ranks would draw masks of parts that they share",
        Combination(
            {"parallel.tp": above(1), "method.lora.rank": above(0), "method.lora.dropout": above(0)},
            "method.lora.dropout={method.lora.dropout:g} needs parallel.tp=1, given {parallel.tp}; use "
            "method.lora.dropout=0",
        ),
    ),
    Refusal(
        "low_rank_fp8",
        "low-rank layers with precision=fp8",
        Combination(
            {"precision.name": "fp8", "method.lora.rank": above(0)},
            "method.lora.rank={method.lora.rank} does not work with precision=fp8; use precision=bf16",
        ),
    ),
    Refusal("tensor_cuts", "heads, key-value heads or ffn width not divisible by tp", rule_checks.tensor_cuts, ("tp",)),
    Refusal(
        "vocabulary_cut",
        "deepspeed with a vocabulary so small that a tensor rank gets no row of it",
        rule_checks.vocabulary_cut,
    ),
    Refusal(
        "ulysses_heads", "ulysses with a tensor rank's heads not divisible by cp", rule_checks.ulysses_heads, ("cp",)
    ),
    Refusal("sequence_cut", "sequences not divisible into equal pieces", rule_checks.sequence_cut),
    Refusal(
        "ring_dropout",
        "ring attention with dropout: its blocks would draw masks that no single process draws",
        Combination(
            {"parallel.cp": above(1), "parallel.cp_kind": "ring", "model.dropout": above(0)},
            "parallel.cp_kind=ring does not support dropout inside attention (model.dropout={model.dropout:g}); use "
            "parallel.cp_kind=ulysses or model.dropout=0",
        ),
    ),
    Refusal(
        "tensor_norm_over_heads",
        "queries and keys normalised over all heads, of which a tensor rank has only its own",
        Combination(
            {"parallel.tp": above(1), "model.qk_norm": True, "model.qk_norm_over": "heads"},
            "model.qk_norm_over=heads needs all heads on one rank, but parallel.tp={parallel.tp} gives each rank its "
            "own; use parallel.tp=1 (with parallel.zero=3 where memory is short)",
        ),
    ),
    Refusal(
        "context_window",
        "a sliding window with context ranks, each of which holds only a slice of the sequence",
        Combination(
            {"parallel.cp": above(1), "model.sliding_window": other_than(None)},
            "model.sliding_window={model.sliding_window} does not work with parallel.cp={parallel.cp}; use "
            "parallel.cp=1, or model.sliding_window=null if no sequence is longer than the window",
        ),
    ),
    Refusal(
        "virtual_stages",
        "a number of stages a rank that the schedule does not support",
        rule_checks.virtual_stages,
    ),
    Refusal("stages", "more stages than blocks, or a split that does not add up", rule_checks.stages, ("pp",)),
    Refusal("micro_batches", "fewer micro-batches than the schedule needs", rule_checks.micro_batches),
    Refusal(
        "hybrid",
        "hybrid sharding under DeepSpeed, at ZeRO 0, or in unequal groups",
        rule_checks.hybrid_sharding,
        ("dp_replicate",),
    ),
    Refusal(
        "offload",
        "offload under native, of what is not sharded, without a place, or of parameters to a disk",
        rule_checks.offload,
    ),
    Refusal(
        "zero_bubble_recompute",
        "zero-bubble schedules with recompute: each half of the backward pass would recompute again",
        Combination(
            {**SPLIT_BACKWARD, "train.recompute": other_than("none")},
            "parallel.schedule={parallel.schedule} runs the backward pass in two halves, and "
            "train.recompute={train.recompute} would recompute in each; use train.recompute=none or "
            "parallel.schedule=interleaved_1f1b",
        ),
    ),
    Refusal(
        "zero_bubble_compile",
        "zero-bubble schedules with compile: the backward pass of a compiled block cannot be split",
        Combination(
            {**SPLIT_BACKWARD, "compile": True},
            "parallel.schedule={parallel.schedule} splits the backward pass, which compiled blocks do not support; use "
            "compile=false or parallel.schedule=interleaved_1f1b",
        ),
    ),
    Refusal(
        "deepspeed_bf16_moments",
        "moments in bf16 under DeepSpeed, whose partitions hold them in fp32",
        Combination(
            {"engine.name": "deepspeed", "optim.moments": "bf16"},
            "optim.moments=bf16 needs engine=native: DeepSpeed's partitions hold moments in fp32",
        ),
    ),
    Refusal(
        "deepspeed_fp8",
        "fp8 under DeepSpeed, whose hooks and partitions are untested with torchao's layers",
        Combination(
            {"engine.name": "deepspeed", "precision.name": "fp8"},
            "precision=fp8 needs engine=native; use that, or precision=bf16",
        ),
    ),
    Refusal(
        "fp8_tensor",
        "fp8 with tensor ranks: they would have to agree on the scale of a cut tensor",
        Combination(
            {"precision.name": "fp8", "parallel.tp": above(1)},
            "precision=fp8 with parallel.tp={parallel.tp}: use parallel.tp=1 (with parallel.zero=3 where memory is "
            "short), or precision=bf16",
        ),
    ),
    Refusal(
        "fp8_zero_bubble",
        "fp8 under zero-bubble schedules: its layers compute both gradients whichever is asked for",
        Combination(
            {"precision.name": "fp8", **SPLIT_BACKWARD},
            "precision=fp8 with parallel.schedule={parallel.schedule}, which splits the backward pass, would compute "
            "every gradient twice; use parallel.schedule=interleaved_1f1b or precision=bf16",
        ),
    ),
    Refusal(
        "fp8_tokens",
        "fp8 with a micro-batch whose tokens are not a multiple of 16, as its matrix products need",
        rule_checks.fp8_tokens,
    ),
    Refusal("fp32_low_sums", "precision=fp32 with gradients summed or reduced in less", rule_checks.fp32_low_sums),
    Refusal(
        "foreign_accumulate_dtype",
        "gradients summed in a format that is neither fp32 nor the compute format",
        rule_checks.accumulate_dtype,
    ),
    Refusal(
        "foreign_reduce_dtype",
        "gradients reduced in a format that is neither fp32 nor the compute format",
        rule_checks.reduce_dtype,
    ),
    Refusal(
        "native_low_accumulation",
        "native on several ranks with gradients summed in less than fp32: FSDP2 sums shards in the masters' format",
        rule_checks.native_accumulation,
    ),
    Refusal(
        "native_low_reduction",
        "native with gradients reduced in less than fp32 where FSDP2 would sum micro-batches in that format too",
        rule_checks.native_reduction,
    ),
    Refusal(
        "deepspeed_zero0_fp32_accumulation",
        "low precision with fp32 sums at DeepSpeed's ZeRO 0, which does not implement them",
        Combination(
            {
                "engine.name": "deepspeed",
                "parallel.zero": 0,
                "precision.name": other_than("fp32"),
                "precision.accumulate_dtype": "fp32",
            },
            "DeepSpeed cannot accumulate {precision.name} gradients in fp32 at parallel.zero=0; use parallel.zero=1 "
            "(the same memory on one rank, less on more), or precision.accumulate_dtype={precision.name}",
        ),
    ),
    Refusal(
        "deepspeed_zero0_fp16",
        "fp16 at DeepSpeed's ZeRO 0, whose optimizer does not scale the loss",
        Combination(
            {"engine.name": "deepspeed", "parallel.zero": 0, "precision.name": "fp16"},
            "DeepSpeed's unsharded fp16 optimizer does not scale the loss; use parallel.zero=1 or precision=bf16",
        ),
    ),
    Refusal(
        # measured in bf16 on two tensor ranks: a norm of 1.687, where one process and ZeRO 1 to 3 give 2.366
        "deepspeed_zero0_low_tensor",
        "low precision with tensor ranks at DeepSpeed's ZeRO 0, whose gradient norm is the first tensor rank's alone",
        Combination(
            {
                "engine.name": "deepspeed",
                "parallel.zero": 0,
                "parallel.tp": above(1),
                "precision.name": other_than("fp32"),
            },
            "DeepSpeed's unsharded {precision.name} optimizer clips by the first tensor rank's gradients alone; use "
            "parallel.zero=1 or parallel.tp=1",
        ),
    ),
    Refusal(
        "deepspeed_tensor_compiled_dropout",
        "compiled blocks with dropout on DeepSpeed's tensor ranks: untested that heads draw different masks there",
        Combination(
            {
                "engine.name": "deepspeed",
                "parallel.tp": above(1),
                "compile": True,
                "model.dropout": above(0),
            },
            "compile=true with model.dropout={model.dropout:g} and parallel.tp={parallel.tp} under engine=deepspeed: "
            "use compile=false, model.dropout=0 or engine=native",
        ),
    ),
    Refusal(
        # seen: "c10d._allgather_base_ encountered during backward but not found in storage", on two ranks
        "deepspeed_zero3_selective",
        "selective recompute at DeepSpeed's ZeRO 3: it gathers inside the block, which the recompute cannot repeat",
        Combination(
            {"engine.name": "deepspeed", "parallel.zero": 3, "train.recompute": "selective"},
            "train.recompute=selective fails under DeepSpeed at parallel.zero=3, which gathers parameters inside the "
            "recomputed block; use train.recompute=full, parallel.zero=2 or engine=native",
        ),
    ),
    Refusal(
        # measured on a 2-block model: 11 graph fragments, torch's recompile limit hit, losses bit-equal to uncompiled
        "deepspeed_zero3_compile",
        "compile at DeepSpeed's ZeRO 3, whose hooks split every block into fragments",
        Combination(
            {"engine.name": "deepspeed", "parallel.zero": 3, "compile": True},
            "compile=true does nothing under DeepSpeed at parallel.zero=3, whose hooks split every block into "
            "fragments; use parallel.zero=2, or compile=false",
        ),
    ),
)
"""The refused rows. The first one that applies gives the message."""


def refusal(config: TrainConfig, world_size: int) -> Refusal | None:
    """Return the row that refuses a job, or None if the job is legal."""
    return next((row for row in REFUSALS if row.check(config, world_size) is not None), None)


def is_legal(config: TrainConfig, world_size: int) -> bool:
    """Return whether no row refuses a job, and every rank gets whole micro-batches in every step."""
    unit = config.train.micro_batch_size * Layout.of(config, world_size).dp
    return refusal(config, world_size) is None and all(size % unit == 0 for size in batch_sizes(config.train))


def explain(row: Refusal, config: TrainConfig, world_size: int) -> str | None:
    """Return the row's message with the nearest values of its degrees that work, or None if the row does not apply.

    Such a value makes the whole job legal; where neither a value nor another number of ranks does, it makes at least
    this row and the ranks' division legal.
    """
    text = row.check(config, world_size)
    if text is None or not row.degrees:
        return text
    options: list[str] = []
    ranks = other_ranks(config, world_size) if row.check is rule_checks.world_size else ""
    for degree in row.degrees:
        given = getattr(config.parallel, degree)
        if given > 1 and (found := _legal_values(row, degree, config, world_size, partly=not ranks)):
            verb = "" if options else "give "
            options.append(f"{verb}parallel.{degree}={either(nearest(found, given))}")
    if ranks:
        options.append(ranks)
    return f"{text}; {', or '.join(options)}" if options else text


def other_ranks(config: TrainConfig, world_size: int) -> str:
    """Return advice to start the nearest smaller or larger number of ranks with which the job is legal.

    Every node has as many ranks. Empty if there is no such number up to twice `world_size`, or twice the least one.
    """
    nodes = config.launch.num_nodes or 1
    unit = lcm(nodes, prod(getattr(config.parallel, axis) for axis in DEGREES))
    above = (world_size // unit + 1) * unit
    sides = (range(above - unit, 0, -unit), range(above, 2 * max(world_size, unit) + 1, unit))
    found = [next((n for n in side if n != world_size and is_legal(config, n)), None) for side in sides]
    ranks = [count for count in found if count is not None]
    if not ranks:
        return ""
    noun = "rank" if ranks == [1] else "ranks"
    return f"start {either(ranks)} {noun} (launch.nproc_per_node={either([count // nodes for count in ranks])})"


def _legal_values(row: Refusal, degree: str, config: TrainConfig, world_size: int, partly: bool) -> list[int]:
    """Return the values of one degree with which the job is legal, the other keys as given.

    If there is none, and with `partly`, those with which the row and the ranks' division are legal.
    """
    parallel: Any = config.parallel
    jobs = {value: replace(config, parallel=replace(parallel, **{degree: value})) for value in divisors(world_size)}
    if legal := [value for value, job in jobs.items() if is_legal(job, world_size)]:
        return legal
    if not partly:
        return []
    both = (row.check, rule_checks.world_size)
    return [value for value, job in jobs.items() if not any(check(job, world_size) for check in both)]


def check_degrees(config: TrainConfig, world_size: int) -> None:
    """Refuse ranks that are not divisible by the product of the degrees. Run it before checks that need `dp`.

    Raises:
        ConfigError: with degrees and numbers of ranks that work.
    """
    if text := explain(REFUSALS[0], config, world_size):
        raise ConfigError(text)


def check(config: TrainConfig, world_size: int) -> None:
    """Refuse an illegal combination.

    Raises:
        ConfigError: with the reason and the nearest legal change.
    """
    for row in REFUSALS:
        if text := explain(row, config, world_size):
            raise ConfigError(text)

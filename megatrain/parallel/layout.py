"""World size to axes, rank to coordinate, and THE TABLE of what combines: legal, or refused with the reason and a change.

Plain data, checked without torch; the engines trust it, and messages, tests and docs are made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from megatrain.config import ModelConfig, TrainConfig
from megatrain.errors import ConfigError

LOOPED = ("interleaved_1f1b", "interleaved_zero_bubble")
"""Schedules whose ranks hold several stages each, dealt round: rank r holds stages r, r + pp, r + 2 pp, ..."""

V_SHAPED = ("zbv_zero_bubble",)
"""Schedules whose ranks hold two stages each, there and back: rank r holds stages r and 2 pp - 1 - r."""

ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv_zero_bubble")
"""Schedules that split the backward pass into the inputs' part and the weights' part."""


class Coordinate(NamedTuple):
    """A rank's place on each axis, outermost first."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """How a job is split. `dp` is the data-parallel degree: the world divided by all other degrees.

    Ranks are numbered with tensor ranks innermost, so that a tensor group lies inside a node, and pipeline stages
    outermost, because they talk least.
    """

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
        """The layout that a config and a number of ranks make."""
        parallel = config.parallel
        return cls(
            world_size=world_size,
            dp=max(1, world_size // (parallel.tp * parallel.pp * parallel.cp)),
            cp=parallel.cp,
            tp=parallel.tp,
            pp=parallel.pp,
            zero=parallel.zero,
            dp_replicate=parallel.dp_replicate,
            schedule=parallel.schedule,
            virtual_stages=parallel.virtual_stages,
            cp_kind=parallel.cp_kind,
            engine=config.engine.name,
            precision=config.precision.name,
        )

    def coordinate(self, rank: int) -> Coordinate:
        """Where a rank stands."""
        rank, tp = divmod(rank, self.tp)
        rank, cp = divmod(rank, self.cp)
        pp, dp = divmod(rank, self.dp)
        return Coordinate(pp, dp, cp, tp)

    def rank(self, place: Coordinate) -> int:
        """Who stands there."""
        return ((place.pp * self.dp + place.dp) * self.cp + place.cp) * self.tp + place.tp

    def dp_rank(self, rank: int) -> int:
        """Return which share of the samples a rank reads."""
        return self.coordinate(rank).dp

    @property
    def dp_cp_size(self) -> int:
        """Ranks that hold the same parameters: data-parallel ranks read other samples, context ranks other tokens."""
        return self.dp * self.cp

    def dp_cp_rank(self, rank: int) -> int:
        """Return a rank's index among those that hold the same parameters: which share of the tokens it works on."""
        place = self.coordinate(rank)
        return place.dp * self.cp + place.cp

    @property
    def readers(self) -> list[int]:
        """For each share of the data the first rank that reads it."""
        return [self.rank(Coordinate(0, dp, 0, 0)) for dp in range(self.dp)]

    @property
    def shards(self) -> int:
        """Ranks that share one copy of what ZeRO cuts: context ranks hold the same parameters as data ranks do."""
        return self.dp * self.cp // self.dp_replicate

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the whole job."""
        return self.pp * self.virtual_stages

    def stages_of(self, pp_rank: int) -> list[int]:
        """The stages that a pipeline rank holds, in model order."""
        if self.schedule in V_SHAPED and self.pp > 1:
            return [pp_rank, self.num_stages - 1 - pp_rank]
        return list(range(pp_rank, self.num_stages, self.pp))

    def describe(self) -> str:
        """One line for logs and tags: the degrees that are not 1."""
        degrees = [f"{axis}={getattr(self, axis)}" for axis in ("tp", "cp", "pp") if getattr(self, axis) > 1]
        parts = [self.engine, f"dp={self.dp}", *degrees, f"zero={self.zero}", self.precision]
        if self.pp > 1:
            parts.insert(-1, self.schedule + (f" x {self.virtual_stages}" if self.virtual_stages > 1 else ""))
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON values for a manifest."""
        return asdict(self)


# ---------------------------------------------------------------------------------------------------- stages


def end_weights(model: ModelConfig) -> tuple[float, float]:
    """Work of the embedding's and the head's stage beside their blocks, in blocks: matrix products, which a look-up has
    none of, so that the embedding counts only the memory traffic of its row gradients (a tenth of a head)."""
    heads = (2 * model.num_heads + 2 * model.kv_heads) * model.head_dim
    mlp = (3 if model.activation == "swiglu" else 2) * model.ffn_dim
    head = model.vocab / (heads + mlp) if model.vocab_size else 0.0
    return 0.1 * head, head


def head_in_chunks(config: TrainConfig, layout: Layout) -> bool:
    """Whether head and loss are computed together, some tokens at a time, with their gradients.

    Not where the vocabulary is cut over ranks, nor under a schedule that splits the backward pass, which they do not have.
    """
    split = layout.pp > 1 and layout.schedule in ZERO_BUBBLE
    return config.kernels != "reference" and layout.tp == 1 and not split


def stage_layers(config: TrainConfig, num_stages: int) -> list[range]:
    """Which blocks each pipeline stage holds, first to last: `parallel.layers_per_stage`, or balanced.

    Balanced means that the heaviest stage is as light as can be, the embedding and the head counted in blocks.
    A stage always holds a block.
    """
    counts = list(config.parallel.layers_per_stage) or balanced(
        config.model.num_layers, num_stages, *end_weights(config.model)
    )
    edges = [sum(counts[:index]) for index in range(len(counts) + 1)]
    return [range(first, last) for first, last in pairwise(edges)]


def describe(config: TrainConfig, layout: Layout) -> str:
    """A job's layout on one line, with the blocks of each pipeline stage where there is a pipeline."""
    if layout.pp == 1:
        return layout.describe()
    counts = "+".join(str(len(layers)) for layers in stage_layers(config, layout.num_stages))
    return f"{layout.describe()} (blocks {counts})"


def balanced(num_layers: int, num_stages: int, before: float, after: float) -> list[int]:
    """Blocks a stage, at least one each, with `before` blocks' worth of work ahead of the first and `after` behind the last.

    Deals blocks one by one to whichever stage is lightest then, earlier stages first.
    """
    counts = [1] * num_stages
    loads = [1.0] * num_stages
    loads[0] += before
    loads[-1] += after
    for _ in range(num_layers - num_stages):
        lightest = min(range(num_stages), key=lambda stage: loads[stage])
        counts[lightest] += 1
        loads[lightest] += 1
    return counts


# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Refusal:
    """One row of the table: a combination that is refused, why, and what to change.

    `text(config, world_size)` gives the message where the row applies, None elsewhere; `summary` is the row in the docs.
    """

    name: str
    summary: str
    text: Callable[[TrainConfig, int], str | None]


def divisors(number: int) -> list[int]:
    """The divisors of a number, rising."""
    low = [count for count in range(1, int(number**0.5) + 1) if number % count == 0]
    return sorted({*low, *(number // count for count in low)})


def listed(numbers: list[int], most: int = 24) -> str:
    """Numbers for a message, cut short where they are many."""
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


def _is_low(config: TrainConfig) -> bool:
    return config.precision.name != "fp32"


def _compute(config: TrainConfig) -> str:
    """The format of activations."""
    return "bf16" if config.precision.name == "fp8" else config.precision.name


def _tokens(config: TrainConfig) -> int:
    """Of a micro-batch, on a rank."""
    return config.train.micro_batch_size * config.train.seq_len // config.parallel.cp


def _nearest_for_fp8(config: TrainConfig) -> int:
    """A sequence length that fp8 takes with any micro-batch, not above the one given where there is one."""
    unit = 16 * config.parallel.cp
    return max(unit, config.train.seq_len // unit * unit)


def _is_deepspeed(config: TrainConfig) -> bool:
    return config.engine.name == "deepspeed"


def _world_does_not_factor(config: TrainConfig, world_size: int) -> str | None:
    p = config.parallel
    unit = p.tp * p.pp * p.cp
    if world_size % unit == 0:
        return None
    below, above = world_size // unit * unit, (world_size // unit + 1) * unit
    return (
        f"{f'{world_size} ranks do' if world_size > 1 else 'one rank does'} not divide by parallel.tp={p.tp} x parallel.pp={p.pp} x parallel.cp={p.cp} = {unit}; "
        f"start {f'{below} or {above}' if below else above} ranks (launch.nproc_per_node), or "
        + (
            f"choose degrees whose product is one of {listed(divisors(world_size))}"
            if world_size > 1
            else "leave them at 1"
        )
    )


def _does_not_divide(key: str, size: int, degree_key: str, degree: int, others: int = 1) -> str | None:
    """The message where `size / others` does not divide by a degree."""
    if (size // others) % degree == 0:
        return None
    fitting = [count for count in divisors(size // others)]
    share = f" / parallel.tp={others}" if others > 1 else ""
    return f"{key}={size}{share} does not divide by {degree_key}={degree}: {listed(fitting)} do"


def _tensor_cuts(config: TrainConfig, _: int) -> str | None:
    tp, model = config.parallel.tp, config.model
    for key, size in (
        ("model.num_heads", model.num_heads),
        ("model.num_kv_heads", model.kv_heads),
        ("model.ffn_size", model.ffn_dim),
    ):
        if text := _does_not_divide(key, size, "parallel.tp", tp):
            return text
    return None


def _vocabulary_cut(config: TrainConfig, _: int) -> str | None:
    tp, vocab = config.parallel.tp, config.model.vocab_size
    if not _is_deepspeed(config) or vocab is None or -(-vocab // tp) * (tp - 1) < vocab:
        return None
    fitting = [count for count in divisors(tp)[:-1] if -(-vocab // count) * (count - 1) < vocab]
    return (
        f"model.vocab_size={vocab} leaves a rank of parallel.tp={tp} without a row, which AutoTP does not take; use "
        f"parallel.tp={fitting[-1]} or engine=native"
    )


def _sequence_cut(config: TrainConfig, _: int) -> str | None:
    p, length = config.parallel, config.train.seq_len
    pieces = p.cp * (2 if p.cp_kind == "ring" and p.cp > 1 else 1)
    local = p.tp if config.engine.name == "native" else 1
    if length % (pieces * local) == 0:
        return None
    unit = pieces * local
    longest = config.model.max_seq_len
    nearest = [size for size in (length // unit * unit, (length // unit + 1) * unit) if 0 < size <= longest]
    advice = (
        f"nearest: {' or '.join(map(str, nearest))}" if nearest else f"model.max_seq_len={longest} needs lower degrees"
    )
    return (
        f"train.seq_len={length} does not cut into {unit} equal pieces (parallel.cp={p.cp}"
        f"{', two pieces a rank for ring' if p.cp_kind == 'ring' and p.cp > 1 else ''}"
        f"{f', parallel.tp={p.tp} for sequence parallelism' if local > 1 else ''}); "
        f"{advice}"
    )


def _ulysses_heads(config: TrainConfig, _: int) -> str | None:
    p, model = config.parallel, config.model
    if p.cp == 1 or p.cp_kind != "ulysses":
        return None
    for key, size in (("model.num_heads", model.num_heads), ("model.num_kv_heads", model.kv_heads)):
        if text := _does_not_divide(key, size, "parallel.cp", p.cp, p.tp):
            return f"{text}; or use parallel.cp_kind=ring, which does not exchange heads"
    return None


def _stages(config: TrainConfig, _: int) -> str | None:
    p, layers = config.parallel, config.model.num_layers
    if p.pp == 1:
        return None
    stages = p.pp * p.virtual_stages
    if stages > layers:
        return (
            f"model.num_layers={layers} blocks do not fill parallel.pp={p.pp} x parallel.virtual_stages="
            f"{p.virtual_stages} = {stages} stages, one block each at least; use at most {layers} stages: "
            f"{f'parallel.pp={layers // p.virtual_stages} or less' if layers > p.virtual_stages else 'parallel.pp=1'}"
        )
    given = list(p.layers_per_stage)
    if given and (len(given) != stages or sum(given) != layers or 0 in given):
        example = balanced(layers, stages, *end_weights(config.model))
        return (
            f"parallel.layers_per_stage={given} must give each of {stages} stages a block or more, {layers} "
            f"(model.num_layers) in all; for example {example}"
        )
    return None


def _virtual_stages(config: TrainConfig, _: int) -> str | None:
    p = config.parallel
    if p.pp == 1:
        if p.virtual_stages > 1 or p.layers_per_stage:
            key = "virtual_stages" if p.virtual_stages > 1 else "layers_per_stage"
            return f"parallel.{key} divides a pipeline and parallel.pp=1 has none; leave it out, or use parallel.pp=2"
        return None
    if p.schedule in LOOPED and p.virtual_stages < 2:
        return (
            f"parallel.schedule={p.schedule} needs parallel.virtual_stages=2 or more; with 1 use parallel.schedule=1f1b"
        )
    if p.schedule in V_SHAPED and p.virtual_stages != 2:
        return f"parallel.schedule={p.schedule} holds two stages a rank; use parallel.virtual_stages=2"
    if p.schedule in ("gpipe", "1f1b") and p.virtual_stages != 1:
        return (
            f"parallel.schedule={p.schedule} holds one stage a rank; use parallel.virtual_stages=1, or "
            f"parallel.schedule=interleaved_1f1b for {p.virtual_stages}"
        )
    return None


def micro_batches(config: TrainConfig, world_size: int) -> list[int]:
    """Micro-batches a rank runs in a step, for every batch size of the run."""
    from megatrain.optim.schedule import batch_sizes

    dp = Layout.of(config, world_size).dp
    return [size // (config.train.micro_batch_size * dp) for size in batch_sizes(config.train)]


def _micro_batches(config: TrainConfig, world_size: int) -> str | None:
    p = config.parallel
    if p.pp == 1 or p.schedule == "gpipe":
        return None
    least = p.pp * p.virtual_stages if p.schedule in V_SHAPED else p.pp
    unit = config.train.micro_batch_size * Layout.of(config, world_size).dp
    *ramp, last = micro_batches(config, world_size)
    if ramp and (min(ramp) < least or (p.schedule in LOOPED and any(count % p.pp for count in ramp))):
        rounds = f", in rounds of parallel.pp={p.pp}" if p.schedule in LOOPED else ""
        return (
            f"parallel.schedule={p.schedule} needs {least} micro-batches a step or more{rounds}, and the batch ramp passes "
            f"steps of {', '.join(map(str, ramp[:6]))}; use train.batch_ramp_start={least * unit} and "
            f"train.batch_ramp_increment={p.pp * unit}"
        )
    for count in [last]:
        if count < least:
            simplest = "parallel.schedule=gpipe" + (" with parallel.virtual_stages=1" if p.virtual_stages > 1 else "")
            return (
                f"parallel.schedule={p.schedule} with parallel.pp={p.pp} needs {least} micro-batches a step or more, and "
                f"this job has {count}; use train.global_batch_size={least * unit}, a smaller train.micro_batch_size, or "
                f"{simplest}"
            )
        if p.schedule in LOOPED and count % p.pp:
            below, above = count // p.pp * p.pp, (count // p.pp + 1) * p.pp
            return (
                f"parallel.schedule={p.schedule} deals micro-batches in rounds of parallel.pp={p.pp}, and this job has "
                f"{count} a step; use train.global_batch_size={below * unit} or {above * unit}"
            )
    return None


def _hybrid(config: TrainConfig, world_size: int) -> str | None:
    p = config.parallel
    if p.dp_replicate == 1:
        return None
    if _is_deepspeed(config):
        return f"parallel.dp_replicate={p.dp_replicate} needs engine=native"
    if p.zero == 0:
        return "parallel.zero=0 replicates everything; leave parallel.dp_replicate out, or use parallel.zero=1, 2 or 3"
    dp = Layout.of(config, world_size).dp
    return _does_not_divide("the data-parallel degree", dp, "parallel.dp_replicate", p.dp_replicate)


def _offload(config: TrainConfig, _: int) -> str | None:
    engine, zero = config.engine, config.parallel.zero
    if engine.offload == "none":
        if engine.offload_parameters:
            return "engine.offload_parameters=true does not say where to; add engine.offload=cpu or engine.offload=nvme"
        return None
    if not _is_deepspeed(config):
        return f"engine.offload={engine.offload} needs engine=deepspeed"
    if engine.offload == "nvme" and engine.nvme_path is None:
        return "engine.offload=nvme needs engine.nvme_path, a folder on a fast local disk; or use engine.offload=cpu"
    if engine.offload == "nvme" and engine.offload_parameters:
        # DeepSpeed's buffers take 1e8 numbers a parameter, and it keeps the first 1e9 numbers in memory: not shown to work
        return "engine.offload=nvme takes masters and optimizer states; engine.offload_parameters=true needs engine.offload=cpu"
    if zero < 3 and (engine.offload == "nvme" or engine.offload_parameters):
        key = "offload=nvme" if engine.offload == "nvme" else "offload_parameters=true"
        return f"engine.{key} needs parallel.zero=3, this job has parallel.zero={zero}; or use engine.offload=cpu alone"
    if zero == 0:
        return f"engine.offload={engine.offload} needs shards to move; use parallel.zero=1, 2 or 3"
    if engine.offload_parameters and config.parallel.tp > 1:
        return (
            f"engine.offload_parameters=true with parallel.tp={config.parallel.tp} would still make a rank's whole block on "
            f"the device first; use engine.offload_parameters=false or parallel.tp=1"
        )
    return None


REFUSALS = (
    Refusal("world_does_not_factor", "ranks that tp x pp x cp does not divide", _world_does_not_factor),
    Refusal(
        "deepspeed_pipeline",
        "pipeline under engine=deepspeed: its PipelineModule refuses ZeRO 2 and 3",
        lambda config, _: (
            f"parallel.pp={config.parallel.pp} needs engine=native"
            if _is_deepspeed(config) and config.parallel.pp > 1
            else None
        ),
    ),
    Refusal("tensor_cuts", "heads, key-value heads or ffn that tp does not divide", _tensor_cuts),
    Refusal(
        "vocabulary_cut", "deepspeed with a vocabulary so small that a tensor rank gets no row of it", _vocabulary_cut
    ),
    Refusal("ulysses_heads", "heads of a tensor rank that cp does not divide (ulysses)", _ulysses_heads),
    Refusal("sequence_cut", "sequences that do not cut into equal pieces", _sequence_cut),
    Refusal(
        "ring_dropout",
        "ring attention with dropout: its blocks would draw masks that no single process draws",
        lambda config, _: (
            f"parallel.cp_kind=ring takes no dropout inside attention (model.dropout={config.model.dropout:g}); use "
            f"parallel.cp_kind=ulysses or model.dropout=0"
            if config.parallel.cp > 1 and config.parallel.cp_kind == "ring" and config.model.dropout > 0
            else None
        ),
    ),
    Refusal("virtual_stages", "stages a rank that the schedule does not take", _virtual_stages),
    Refusal("stages", "more stages than blocks, or a split that does not add up", _stages),
    Refusal("micro_batches", "fewer micro-batches than the schedule needs", _micro_batches),
    Refusal("hybrid", "hybrid sharding under DeepSpeed, at ZeRO 0, or uneven", _hybrid),
    Refusal(
        "offload", "offload under native, of what is not sharded, without a place, or of parameters to a disk", _offload
    ),
    Refusal(
        "zero_bubble_recompute",
        "zero-bubble schedules with recompute: each half of the backward pass would recompute again",
        lambda config, _: (
            f"parallel.schedule={config.parallel.schedule} runs the backward pass in two halves, and "
            f"train.recompute={config.train.recompute} would recompute in each; use train.recompute=none or "
            f"parallel.schedule=interleaved_1f1b"
            if config.parallel.pp > 1 and config.parallel.schedule in ZERO_BUBBLE and config.train.recompute != "none"
            else None
        ),
    ),
    Refusal(
        "zero_bubble_compile",
        "zero-bubble schedules with compile: a compiled block's backward cannot be split",
        lambda config, _: (
            f"parallel.schedule={config.parallel.schedule} splits the backward pass, which a compiled block's cannot be; "
            f"use compile=false or parallel.schedule=interleaved_1f1b"
            if config.parallel.pp > 1 and config.parallel.schedule in ZERO_BUBBLE and config.compile
            else None
        ),
    ),
    Refusal(
        "deepspeed_bf16_moments",
        "moments in bf16 under DeepSpeed, whose partitions hold them in fp32",
        lambda config, _: (
            "optim.moments=bf16 needs engine=native: DeepSpeed's partitions hold moments in fp32"
            if _is_deepspeed(config) and config.optim.moments == "bf16"
            else None
        ),
    ),
    Refusal(
        "deepspeed_fp8",
        "fp8 under DeepSpeed, whose hooks and partitions are not shown to work with torchao's layers",
        lambda config, _: (
            "precision=fp8 needs engine=native; use that, or precision=bf16"
            if _is_deepspeed(config) and config.precision.name == "fp8"
            else None
        ),
    ),
    Refusal(
        "fp8_tensor",
        "fp8 with tensor ranks: the scale of a cut tensor would have to be agreed on",
        lambda config, _: (
            f"precision=fp8 with parallel.tp={config.parallel.tp}: use parallel.tp=1 (with parallel.zero=3 where memory is "
            f"short), or precision=bf16"
            if config.precision.name == "fp8" and config.parallel.tp > 1
            else None
        ),
    ),
    Refusal(
        "fp8_zero_bubble",
        "fp8 under zero-bubble schedules: its layers compute both gradients whichever is asked for",
        lambda config, _: (
            f"precision=fp8 with parallel.schedule={config.parallel.schedule}, which splits the backward pass, would do it "
            f"twice; use parallel.schedule=interleaved_1f1b or precision=bf16"
            if config.precision.name == "fp8" and config.parallel.pp > 1 and config.parallel.schedule in ZERO_BUBBLE
            else None
        ),
    ),
    Refusal(
        "fp8_tokens",
        "fp8 with a micro-batch whose tokens are no multiple of 16, which its products do not take",
        lambda config, _: (
            f"precision=fp8 takes micro-batches of a multiple of 16 tokens on a rank, and train.micro_batch_size="
            f"{config.train.micro_batch_size} x train.seq_len={config.train.seq_len} / parallel.cp={config.parallel.cp} is "
            f"{_tokens(config)}; use train.seq_len={_nearest_for_fp8(config)} or precision=bf16"
            if config.precision.name == "fp8" and _tokens(config) % 16
            else None
        ),
    ),
    Refusal(
        "fp32_low_sums",
        "precision=fp32 with gradients summed or reduced in less",
        lambda config, _: (
            f"precision=fp32 sums and reduces gradients in fp32; precision.accumulate_dtype="
            f"{config.precision.accumulate_dtype} and precision.reduce_dtype={config.precision.reduce_dtype} need "
            f"precision=bf16 or fp16"
            if config.precision.name == "fp32"
            and (config.precision.accumulate_dtype, config.precision.reduce_dtype) != ("fp32", "fp32")
            else None
        ),
    ),
    Refusal(
        "foreign_accumulate_dtype",
        "gradients summed in a format that is neither fp32 nor the compute format",
        lambda config, _: (
            f"precision.accumulate_dtype={config.precision.accumulate_dtype} does not go with "
            f"precision={config.precision.name}; use fp32 or {_compute(config)}"
            if _is_low(config) and config.precision.accumulate_dtype not in ("fp32", _compute(config))
            else None
        ),
    ),
    Refusal(
        "foreign_reduce_dtype",
        "gradients reduced in a format that is neither fp32 nor the compute format",
        lambda config, _: (
            f"precision.reduce_dtype={config.precision.reduce_dtype} does not go with precision="
            f"{config.precision.name}; use fp32 or {_compute(config)}"
            if _is_low(config) and config.precision.reduce_dtype not in ("fp32", _compute(config))
            else None
        ),
    ),
    Refusal(
        "native_low_accumulation",
        "native on several ranks with gradients summed in less than fp32: FSDP2 sums shards in the masters' format",
        lambda config, world_size: (
            f"engine=native on several ranks sums gradients in fp32, whatever travels between them; "
            f"precision.accumulate_dtype={config.precision.accumulate_dtype} needs engine=deepspeed, or use fp32"
            if not _is_deepspeed(config)
            and world_size > 1
            and _is_low(config)
            and config.precision.accumulate_dtype != "fp32"
            else None
        ),
    ),
    Refusal(
        "native_low_reduction",
        "native with gradients that travel in less than fp32 where FSDP2 would sum micro-batches in that format too",
        lambda config, world_size: (
            "engine=native sums micro-batches in the format that gradients travel in where it reduces once a step "
            "(a pipeline, or parallel.zero=0 or 1); use precision.reduce_dtype=fp32, or parallel.zero=2 or 3 with "
            "parallel.pp=1"
            if not _is_deepspeed(config)
            and world_size > 1
            and _is_low(config)
            and config.precision.reduce_dtype != "fp32"
            and (config.parallel.pp > 1 or config.parallel.zero < 2)
            else None
        ),
    ),
    Refusal(
        "deepspeed_zero0_fp32_accumulation",
        "low precision with fp32 sums at DeepSpeed's ZeRO 0, which it does not implement",
        lambda config, _: (
            f"DeepSpeed cannot accumulate {config.precision.name} gradients in fp32 at parallel.zero=0; use "
            f"parallel.zero=1 (the same memory on one rank, less on more), or "
            f"precision.accumulate_dtype={config.precision.name}"
            if _is_deepspeed(config)
            and config.parallel.zero == 0
            and _is_low(config)
            and config.precision.accumulate_dtype == "fp32"
            else None
        ),
    ),
    Refusal(
        "deepspeed_zero0_fp16",
        "fp16 at DeepSpeed's ZeRO 0, whose optimizer does not scale the loss it is given",
        lambda config, _: (
            "DeepSpeed's unsharded fp16 optimizer does not scale the loss it is given; use parallel.zero=1 or "
            "precision=bf16"
            if _is_deepspeed(config) and config.parallel.zero == 0 and config.precision.name == "fp16"
            else None
        ),
    ),
    Refusal(
        # measured in bf16 on two tensor ranks: 1.687 where one process and ZeRO 1 to 3 have a norm of 2.366
        "deepspeed_zero0_low_tensor",
        "low precision with tensor ranks at DeepSpeed's ZeRO 0, which leaves all but the first out of the gradient norm",
        lambda config, _: (
            f"DeepSpeed's unsharded {config.precision.name} optimizer clips by the first tensor rank's gradients alone; use "
            f"parallel.zero=1 or parallel.tp=1"
            if _is_deepspeed(config) and config.parallel.zero == 0 and config.parallel.tp > 1 and _is_low(config)
            else None
        ),
    ),
    Refusal(
        "deepspeed_tensor_compiled_dropout",
        "compiled blocks with dropout on DeepSpeed's tensor ranks: that heads draw masks of their own is not shown there",
        lambda config, _: (
            f"compile=true with model.dropout={config.model.dropout:g} and parallel.tp={config.parallel.tp} under "
            f"engine=deepspeed: use compile=false, model.dropout=0 or engine=native"
            if _is_deepspeed(config) and config.parallel.tp > 1 and config.compile and config.model.dropout > 0
            else None
        ),
    ),
    Refusal(
        # seen: "c10d._allgather_base_ encountered during backward but not found in storage", on two ranks
        "deepspeed_zero3_selective",
        "selective recompute at DeepSpeed's ZeRO 3: it gathers inside the block, which the recompute cannot repeat",
        lambda config, _: (
            "train.recompute=selective fails under DeepSpeed at parallel.zero=3, which gathers parameters inside the "
            "recomputed block; use train.recompute=full, parallel.zero=2 or engine=native"
            if config.train.recompute == "selective" and _is_deepspeed(config) and config.parallel.zero == 3
            else None
        ),
    ),
    Refusal(
        # measured on a 2-block model: 11 graph fragments, torch's recompile limit hit, losses bit-equal to uncompiled
        "deepspeed_zero3_compile",
        "compile at DeepSpeed's ZeRO 3, whose hooks split every block into fragments",
        lambda config, _: (
            "compile=true does nothing under DeepSpeed at parallel.zero=3, whose hooks split every block into "
            "fragments; use parallel.zero=2, or compile=false"
            if config.compile and _is_deepspeed(config) and config.parallel.zero == 3
            else None
        ),
    ),
)
"""The refused rows, the first that applies speaking. Everything else is legal."""


def refusal(config: TrainConfig, world_size: int) -> Refusal | None:
    """The row that refuses a job, or None where it is legal."""
    return next((row for row in REFUSALS if row.text(config, world_size) is not None), None)


def check_degrees(config: TrainConfig, world_size: int) -> None:
    """Refuse degrees that do not divide the number of ranks: until they do, nothing else can be said about a layout.

    Raises:
        ConfigError: with numbers of ranks that work.
    """
    if text := _world_does_not_factor(config, world_size):
        raise ConfigError(text)


def check(config: TrainConfig, world_size: int) -> None:
    """Refuse an illegal combination.

    Raises:
        ConfigError: with the reason and the nearest legal change.
    """
    for row in REFUSALS:
        if text := row.text(config, world_size):
            raise ConfigError(text)

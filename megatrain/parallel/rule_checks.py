"""The rules of rules.py that need arithmetic. Each returns a message, or None if the job is legal. Imports no torch.

A message names the key, the given value and values that work.
"""

from __future__ import annotations

from megatrain.config import TrainConfig
from megatrain.config.arithmetic import divisors, either
from megatrain.parallel.layout import DEGREES, Layout, data_parallel_degree
from megatrain.parallel.stages import LOOPED, V_SHAPED, balance_layers, end_loads


def not_divisible(key: str, size: int, degree_key: str, degree: int, tp: int = 1) -> str | None:
    """Return a message if `size / tp` is not divisible by `degree`, else None."""
    if (size // tp) % degree == 0:
        return None
    share = f" / parallel.tp={tp}" if tp > 1 else ""
    return f"{key}={size}{share} is not divisible by {degree_key}={degree}"


def world_size(config: TrainConfig, ranks: int) -> str | None:
    """Refuse ranks that are not divisible by the product of the degrees."""
    unit = 1
    for axis in DEGREES:
        unit *= getattr(config.parallel, axis)
    if ranks % unit == 0:
        return None
    product = " x ".join(f"parallel.{axis}={getattr(config.parallel, axis)}" for axis in DEGREES)
    given = f"{ranks} ranks are" if ranks > 1 else "1 rank is"
    return f"{given} not divisible by {product} = {unit}"


def tensor_cuts(config: TrainConfig, _: int) -> str | None:
    """Refuse heads, key-value heads or a feed-forward width that is not divisible by tp."""
    tp, model = config.parallel.tp, config.model
    for key, size in (
        ("model.num_heads", model.num_heads),
        ("model.num_kv_heads", model.kv_heads),
        ("model.ffn_size", model.ffn_dim),
    ):
        if text := not_divisible(key, size, "parallel.tp", tp):
            return text
    return None


def vocabulary_cut(config: TrainConfig, _: int) -> str | None:
    """Refuse a vocabulary too small to give each of DeepSpeed's tensor ranks a row."""
    tp, vocab = config.parallel.tp, config.model.vocab_size
    if not _is_deepspeed(config) or vocab is None or -(-vocab // tp) * (tp - 1) < vocab:
        return None
    fitting = [count for count in divisors(tp)[:-1] if -(-vocab // count) * (count - 1) < vocab]
    return (
        f"model.vocab_size={vocab} leaves a rank of parallel.tp={tp} without a row, which AutoTP does not support; use "
        f"parallel.tp={fitting[-1]} or engine=native"
    )


def ulysses_heads(config: TrainConfig, _: int) -> str | None:
    """Refuse Ulysses if a tensor rank's heads are not divisible by cp."""
    p, model = config.parallel, config.model
    if p.cp == 1 or p.cp_kind != "ulysses":
        return None
    for key, size in (("model.num_heads", model.num_heads), ("model.num_kv_heads", model.kv_heads)):
        if text := not_divisible(key, size, "parallel.cp", p.cp, p.tp):
            return f"{text}; use parallel.cp_kind=ring, which does not exchange heads"
    return None


def sequence_cut(config: TrainConfig, _: int) -> str | None:
    """Refuse sequences that context and sequence parallelism cannot cut into equal pieces."""
    p, length = config.parallel, config.train.seq_len
    is_ring = p.cp_kind == "ring" and p.cp > 1
    tensor_pieces = p.tp if config.engine.name == "native" else 1
    unit = p.cp * (2 if is_ring else 1) * tensor_pieces
    if length % unit == 0:
        return None
    longest = config.model.max_seq_len
    near = [size for size in (length // unit * unit, (length // unit + 1) * unit) if 0 < size <= longest]
    return (
        f"train.seq_len={length} is not divisible into {unit} equal pieces (parallel.cp={p.cp}"
        f"{', two pieces a rank for ring' if is_ring else ''}"
        f"{f', parallel.tp={p.tp} for sequence parallelism' if tensor_pieces > 1 else ''}); "
        + (f"nearest: {either(near)}" if near else f"lower them: model.max_seq_len={longest}")
    )


def virtual_stages(config: TrainConfig, _: int) -> str | None:
    """Refuse a number of stages per rank that the schedule does not support."""
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


def stages(config: TrainConfig, _: int) -> str | None:
    """Refuse more stages than blocks, or a given split that does not add up."""
    p, layers = config.parallel, config.model.num_layers
    if p.pp == 1:
        return None
    num_stages = p.pp * p.virtual_stages
    if num_stages > layers:
        return (
            f"model.num_layers={layers} blocks are fewer than parallel.pp={p.pp} x parallel.virtual_stages="
            f"{p.virtual_stages} = {num_stages} stages, and each needs one; use at most {layers} stages"
        )
    given = list(p.layers_per_stage)
    if given and (len(given) != num_stages or sum(given) != layers or 0 in given):
        example = balance_layers(layers, num_stages, *end_loads(config.model))
        return (
            f"parallel.layers_per_stage={given} must give each of {num_stages} stages a block or more, {layers} "
            f"(model.num_layers) in all; for example {example}"
        )
    return None


def micro_batches(config: TrainConfig, ranks: int) -> str | None:
    """Refuse too few micro-batches for the schedule, or incomplete rounds, in any step including the batch ramp's."""
    p = config.parallel
    if p.pp == 1 or p.schedule == "gpipe":
        return None
    least = p.pp * p.virtual_stages if p.schedule in V_SHAPED else p.pp
    layout = Layout.of(config, ranks)
    unit = config.train.micro_batch_size * layout.dp
    *ramp, count = layout.micro_batches(config.train)
    in_rounds = p.schedule in LOOPED
    if ramp and (min(ramp) < least or (in_rounds and any(number % p.pp for number in ramp))):
        rounds = f", in rounds of parallel.pp={p.pp}" if in_rounds else ""
        return (
            f"parallel.schedule={p.schedule} needs {least} micro-batches a step or more{rounds}, and the batch ramp "
            f"has steps of {', '.join(map(str, ramp[:6]))}; use train.batch_ramp_start={least * unit} and "
            f"train.batch_ramp_increment={p.pp * unit}"
        )
    if count < least:
        simplest = "parallel.schedule=gpipe" + (" with parallel.virtual_stages=1" if p.virtual_stages > 1 else "")
        return (
            f"parallel.schedule={p.schedule} with parallel.pp={p.pp} needs {least} micro-batches a step or more, and "
            f"this job has {count}; use train.global_batch_size={least * unit}, a smaller train.micro_batch_size, or "
            f"{simplest}"
        )
    if in_rounds and count % p.pp:
        below, above = count // p.pp * p.pp, (count // p.pp + 1) * p.pp
        return (
            f"parallel.schedule={p.schedule} deals micro-batches in rounds of parallel.pp={p.pp}, and this job has "
            f"{count} a step; use train.global_batch_size={below * unit} or {above * unit}"
        )
    return None


def hybrid_sharding(config: TrainConfig, ranks: int) -> str | None:
    """Refuse hybrid sharding under DeepSpeed, at ZeRO 0 or in groups of unequal size."""
    p = config.parallel
    if p.dp_replicate == 1:
        return None
    if _is_deepspeed(config):
        return f"parallel.dp_replicate={p.dp_replicate} needs engine=native"
    if p.zero == 0:
        return "parallel.zero=0 replicates everything; leave parallel.dp_replicate out, or use parallel.zero=1, 2 or 3"
    dp = data_parallel_degree(ranks, [getattr(p, axis) for axis in DEGREES])
    return not_divisible("the data-parallel degree", dp, "parallel.dp_replicate", p.dp_replicate)


def offload(config: TrainConfig, _: int) -> str | None:
    """Refuse offload under native, without shards or a place for them, or where DeepSpeed's does not work or help."""
    engine, zero = config.engine, config.parallel.zero
    if engine.offload == "none":
        if engine.offload_parameters:
            return "engine.offload_parameters=true does not say where to; add engine.offload=cpu"
        return None
    if not _is_deepspeed(config):
        return f"engine.offload={engine.offload} needs engine=deepspeed"
    if engine.offload == "nvme" and engine.nvme_path is None:
        return "engine.offload=nvme needs engine.nvme_path, a folder on a fast local disk; or use engine.offload=cpu"
    if engine.offload == "nvme" and engine.offload_parameters:
        # untested: DeepSpeed's buffers take 1e8 elements per parameter, and it keeps the first 1e9 in memory
        return (
            "engine.offload=nvme offloads masters and optimizer states; engine.offload_parameters=true needs "
            "engine.offload=cpu"
        )
    if zero < 3 and (engine.offload == "nvme" or engine.offload_parameters):
        key = "offload=nvme" if engine.offload == "nvme" else "offload_parameters=true"
        return f"engine.{key} needs parallel.zero=3, this job has parallel.zero={zero}; or use engine.offload=cpu alone"
    if zero == 0:
        return f"engine.offload={engine.offload} needs shards to move; use parallel.zero=1, 2 or 3"
    if engine.offload_parameters and config.parallel.tp > 1:
        return (
            f"engine.offload_parameters=true with parallel.tp={config.parallel.tp} would still make a rank's whole "
            f"block on the device first; use engine.offload_parameters=false or parallel.tp=1"
        )
    return None


def fp8_tokens(config: TrainConfig, _: int) -> str | None:
    """Refuse fp8 if a rank's micro-batch is not a multiple of 16 tokens, as its matrix products need."""
    loop, cp = config.train, config.parallel.cp
    tokens = loop.micro_batch_size * loop.seq_len // cp
    if config.precision.name != "fp8" or tokens % 16 == 0:
        return None
    unit = 16 * cp
    whole = max(unit, loop.seq_len // unit * unit)
    return (
        f"precision=fp8 needs micro-batches of a multiple of 16 tokens on a rank, and train.micro_batch_size="
        f"{loop.micro_batch_size} x train.seq_len={loop.seq_len} / parallel.cp={cp} is {tokens}; use "
        f"train.seq_len={whole} or precision=bf16"
    )


def fp32_low_sums(config: TrainConfig, _: int) -> str | None:
    """Refuse fp32 with gradients summed or reduced in less."""
    precision = config.precision
    if precision.name != "fp32" or (precision.accumulate_dtype, precision.reduce_dtype) == ("fp32", "fp32"):
        return None
    return (
        f"precision=fp32 sums and reduces gradients in fp32; precision.accumulate_dtype={precision.accumulate_dtype} "
        f"and precision.reduce_dtype={precision.reduce_dtype} need precision=bf16 or fp16"
    )


def accumulate_dtype(config: TrainConfig, _: int) -> str | None:
    """Refuse to sum gradients in any format but fp32 and the compute format."""
    return _fp32_or_compute_format(config, "accumulate_dtype", config.precision.accumulate_dtype)


def reduce_dtype(config: TrainConfig, _: int) -> str | None:
    """Refuse to reduce gradients in any format but fp32 and the compute format."""
    return _fp32_or_compute_format(config, "reduce_dtype", config.precision.reduce_dtype)


def native_accumulation(config: TrainConfig, ranks: int) -> str | None:
    """Refuse native sums in less than fp32 on several ranks: FSDP2 sums shards in the masters' format."""
    precision = config.precision
    if _is_deepspeed(config) or ranks == 1 or precision.name == "fp32" or precision.accumulate_dtype == "fp32":
        return None
    return (
        f"engine=native on several ranks sums gradients in fp32, whatever precision.reduce_dtype is; "
        f"precision.accumulate_dtype={precision.accumulate_dtype} needs engine=deepspeed, or use fp32"
    )


def native_reduction(config: TrainConfig, ranks: int) -> str | None:
    """Refuse reduction in less than fp32 where FSDP2 reduces once a step: it sums micro-batches in the same format."""
    precision, p = config.precision, config.parallel
    if _is_deepspeed(config) or ranks == 1 or precision.name == "fp32" or precision.reduce_dtype == "fp32":
        return None
    if p.pp == 1 and p.zero >= 2:
        return None
    return (
        "engine=native sums micro-batches in the format in which gradients are reduced where it reduces once a step "
        "(a pipeline, or parallel.zero=0 or 1); use precision.reduce_dtype=fp32, or parallel.zero=2 or 3 with "
        "parallel.pp=1"
    )


def _fp32_or_compute_format(config: TrainConfig, key: str, given: str) -> str | None:
    name = config.precision.name
    compute = "bf16" if name == "fp8" else name
    if name == "fp32" or given in ("fp32", compute):
        return None
    return f"precision.{key}={given} cannot be combined with precision={name}; use fp32 or {compute}"


def _is_deepspeed(config: TrainConfig) -> bool:
    return config.engine.name == "deepspeed"

"""The table of layouts: one test a refused row, and everything else is legal."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from copy import deepcopy
from itertools import chain, product
from operator import attrgetter
from typing import Any

import pytest

from megatrain.config import ModelConfig, TrainConfig
from megatrain.config.arithmetic import divisors
from megatrain.errors import ConfigError
from megatrain.parallel.layout import Layout, describe
from megatrain.parallel.rules import REFUSALS, check, is_legal, refusal
from megatrain.parallel.stages import balance_layers, stage_layers


def job(engine="deepspeed", zero=3, precision="fp32", accumulate="fp32", reduce="fp32", compiled=False, **changes):
    """A job of 8 heads, 4 key-value heads, 6 blocks and 256 tokens; other keys as `group__key`."""
    config = TrainConfig()
    config.compile = compiled
    config.engine.name, config.parallel.zero, config.precision.name = engine, zero, precision
    config.precision.accumulate_dtype, config.precision.reduce_dtype = accumulate, reduce
    config.model = ModelConfig(
        num_layers=6, num_heads=8, num_kv_heads=4, hidden_size=64, ffn_size=192, vocab_size=1000, max_seq_len=256
    )
    config.train.global_batch_size, config.train.micro_batch_size = 64, 2
    for key, value in changes.items():
        *groups, name = key.split("__")
        place = attrgetter(".".join(groups))(config)
        assert hasattr(place, name), key
        setattr(place, name, value)
    return config


def native(**changes):
    return job("native", **changes)


REFUSED: dict[str, list[Any]] = {
    "world_does_not_factor": [(native(parallel__tp=4), 6, "start 4 or 8 ranks", dict(world=8))],
    "deepspeed_pipeline": [(job(parallel__pp=2), 4, "engine=native", dict(engine__name="native"))],
    "tensor_cuts": [
        (
            native(parallel__tp=3),
            3,
            "model.num_heads=8 is not divisible by parallel.tp=3; give parallel.tp=1",
            dict(parallel__tp=1),
        ),
        (native(parallel__tp=8), 8, "model.num_kv_heads=4", dict(parallel__tp=4)),
        (native(parallel__tp=4, model__ffn_size=190), 4, "model.ffn_size=190", dict(parallel__tp=2)),
    ],
    "low_rank_deepspeed_tensor": [
        (job(method__lora__rank=4, parallel__tp=2), 2, "engine=native", dict(engine__name="native"))
    ],
    "low_rank_offload": [
        (
            job(method__lora__rank=4, parallel__zero=3, engine__offload="cpu"),
            1,
            "engine.offload=none",
            dict(engine__offload="none"),
        )
    ],
    "low_rank_tensor_dropout": [
        (
            native(method__lora__rank=4, method__lora__dropout=0.1, parallel__tp=2),
            2,
            "method.lora.dropout=0",
            dict(method__lora__dropout=0.0),
        )
    ],
    "low_rank_fp8": [
        (native(precision="fp8", method__lora__rank=4), 1, "precision=bf16", dict(precision__name="bf16"))
    ],
    "vocabulary_cut": [
        (job(parallel__tp=4, model__vocab_size=5), 4, "parallel.tp=2 or engine=native", dict(engine__name="native")),
    ],
    "ulysses_heads": [
        (native(parallel__cp=8), 8, "parallel.cp_kind=ring", dict(parallel__cp_kind="ring")),
        (native(parallel__cp=4, parallel__tp=2), 8, "model.num_kv_heads=4 / parallel.tp=2", dict(parallel__cp=2)),
    ],
    "sequence_cut": [
        (native(parallel__tp=2, train__seq_len=255), 2, "nearest: 254 or 256", dict(train__seq_len=254)),
        (
            native(parallel__cp=2, parallel__cp_kind="ring", train__seq_len=250),
            2,
            "248 or 252",
            dict(train__seq_len=252),
        ),
    ],
    "ring_dropout": [
        (
            native(parallel__cp=2, parallel__cp_kind="ring", model__dropout=0.1),
            2,
            "parallel.cp_kind=ulysses",
            dict(parallel__cp_kind="ulysses"),
        )
    ],
    "tensor_norm_over_heads": [
        (
            engine(zero=1, parallel__tp=2, model__qk_norm=True, model__qk_norm_over="heads"),
            2,
            "parallel.tp=1",
            dict(parallel__tp=1),
        )
        for engine in (native, job)
    ],
    "context_window": [
        (
            native(parallel__cp=2, parallel__cp_kind=kind, model__sliding_window=64),
            2,
            "model.sliding_window=null",
            dict(model__sliding_window=None),
        )
        for kind in ("ulysses", "ring")
    ],
    "virtual_stages": [
        (native(parallel__virtual_stages=2), 2, "parallel.pp=2", dict(parallel__virtual_stages=1)),
        (
            native(parallel__pp=2, parallel__schedule="interleaved_1f1b"),
            2,
            "parallel.virtual_stages=2",
            dict(parallel__virtual_stages=2),
        ),
        (
            native(parallel__pp=2, parallel__schedule="zbv_zero_bubble", parallel__virtual_stages=3),
            2,
            "use parallel.virtual_stages=2",
            dict(parallel__virtual_stages=2),
        ),
        (
            native(parallel__pp=2, parallel__virtual_stages=2),
            2,
            "parallel.schedule=interleaved_1f1b",
            dict(parallel__schedule="interleaved_1f1b"),
        ),
    ],
    "stages": [
        (native(parallel__pp=8), 8, "use at most 6 stages", dict(parallel__pp=4)),
        (
            native(parallel__pp=2, parallel__layers_per_stage=[3, 2]),
            2,
            "for example [",
            dict(parallel__layers_per_stage=[4, 2]),
        ),
    ],
    "micro_batches": [
        (
            native(parallel__pp=4, train__global_batch_size=4),
            4,
            "train.global_batch_size=8",
            dict(train__global_batch_size=8),
        ),
        (
            native(
                parallel__pp=2,
                parallel__schedule="interleaved_1f1b",
                parallel__virtual_stages=2,
                train__global_batch_size=10,
            ),
            2,
            "train.global_batch_size=8 or 12",
            dict(train__global_batch_size=12),
        ),
    ],
    "hybrid": [
        (job(parallel__dp_replicate=2), 4, "engine=native", dict(engine__name="native")),
        (native(zero=0, parallel__dp_replicate=2), 4, "parallel.zero=1", dict(parallel__zero=1)),
        (native(parallel__dp_replicate=3), 4, "parallel.dp_replicate=2 or 4", dict(parallel__dp_replicate=2)),
    ],
    "offload": [
        (native(engine__offload="cpu"), 2, "engine=deepspeed", dict(engine__name="deepspeed")),
        (job(engine__offload_parameters=True), 2, "engine.offload=cpu", dict(engine__offload="cpu")),
        (job(engine__offload="nvme"), 2, "engine.nvme_path", dict(engine__nvme_path="/scratch")),
        (job(zero=0, engine__offload="cpu"), 2, "parallel.zero=1", dict(parallel__zero=1)),
        (
            job(engine__offload="nvme", engine__nvme_path="/scratch", engine__offload_parameters=True),
            2,
            "engine.offload=cpu",
            dict(engine__offload="cpu"),
        ),
        (
            job(zero=2, engine__offload="cpu", engine__offload_parameters=True),
            2,
            "parallel.zero=3",
            dict(parallel__zero=3),
        ),
        (
            job(zero=2, engine__offload="nvme", engine__nvme_path="/scratch"),
            2,
            "engine.offload=cpu alone",
            dict(engine__offload="cpu"),
        ),
        (
            job(parallel__tp=2, engine__offload="cpu", engine__offload_parameters=True),
            2,
            "parallel.tp=1",
            dict(parallel__tp=1),
        ),
    ],
    "zero_bubble_recompute": [
        (
            native(
                parallel__pp=2,
                parallel__schedule="zbv_zero_bubble",
                parallel__virtual_stages=2,
                train__recompute="full",
            ),
            2,
            "parallel.schedule=interleaved_1f1b",
            dict(parallel__schedule="interleaved_1f1b"),
        )
    ],
    "zero_bubble_compile": [
        (
            native(
                compiled=True, parallel__pp=2, parallel__schedule="interleaved_zero_bubble", parallel__virtual_stages=2
            ),
            2,
            "compile=false",
            dict(parallel__schedule="interleaved_1f1b"),
        )
    ],
    "deepspeed_bf16_moments": [
        (job(optim__moments="bf16"), 2, "engine=native", dict(engine__name="native")),
    ],
    "deepspeed_fp8": [
        (job(precision="fp8"), 2, "engine=native", dict(engine__name="native")),
        (job(precision="fp8"), 2, "precision=bf16", dict(precision__name="bf16")),
    ],
    "fp8_tensor": [
        (native(precision="fp8", parallel__tp=2), 2, "parallel.tp=1", dict(parallel__tp=1)),
        (native(precision="fp8", parallel__tp=2), 2, "precision=bf16", dict(precision__name="bf16")),
    ],
    "fp8_zero_bubble": [
        (
            native(precision="fp8", parallel__pp=2, parallel__schedule="zbv_zero_bubble", parallel__virtual_stages=2),
            2,
            "parallel.schedule=interleaved_1f1b",
            dict(parallel__schedule="interleaved_1f1b"),
        )
    ],
    "fp8_tokens": [
        (
            native(precision="fp8", train__seq_len=250, train__micro_batch_size=1),
            2,
            "train.seq_len=240",
            dict(train__seq_len=240),
        ),
    ],
    "fp32_low_sums": [(job(accumulate="bf16"), 1, "precision=bf16", dict(precision__name="bf16"))],
    "foreign_accumulate_dtype": [
        (job(precision="bf16", accumulate="fp16"), 2, "use fp32 or bf16", dict(precision__accumulate_dtype="bf16"))
    ],
    "foreign_reduce_dtype": [
        (job(precision="fp16", reduce="bf16"), 2, "use fp32 or fp16", dict(precision__reduce_dtype="fp16"))
    ],
    "native_low_accumulation": [
        (
            native(precision="bf16", accumulate="bf16"),
            2,
            "engine=deepspeed, or use fp32",
            dict(precision__accumulate_dtype="fp32"),
        )
    ],
    "native_low_reduction": [
        (native(zero=1, precision="bf16", reduce="bf16"), 2, "parallel.zero=2", dict(parallel__zero=2)),
        (
            native(precision="bf16", reduce="bf16", parallel__pp=2),
            2,
            "precision.reduce_dtype=fp32",
            dict(precision__reduce_dtype="fp32"),
        ),
    ],
    "deepspeed_zero0_fp32_accumulation": [
        (job(zero=0, precision="bf16"), 2, "parallel.zero=1", dict(parallel__zero=1))
    ],
    "deepspeed_zero0_fp16": [
        (job(zero=0, precision="fp16", accumulate="fp16"), 2, "parallel.zero=1", dict(parallel__zero=1))
    ],
    "deepspeed_zero0_low_tensor": [
        (
            job(zero=0, precision="bf16", accumulate="bf16", parallel__tp=2),
            2,
            "parallel.zero=1",
            dict(parallel__zero=1),
        ),
    ],
    "deepspeed_tensor_compiled_dropout": [
        (
            job(zero=1, compiled=True, parallel__tp=2, model__dropout=0.1),
            2,
            "model.dropout=0",
            dict(model__dropout=0.0),
        ),
    ],
    "deepspeed_zero3_selective": [
        (job(train__recompute="selective"), 2, "train.recompute=full", dict(train__recompute="full"))
    ],
    "deepspeed_zero3_compile": [(job(compiled=True), 2, "parallel.zero=2", dict(parallel__zero=2))],
}
"""For each row of the table: a refused job, its ranks, the advice in the message, and the change that it advises."""


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.name)
def test_each_refused_row_speaks_for_itself(row):
    """The row's examples are refused by that row alone first, the message advises a change, and the change is legal."""
    for config, world_size, advice, change in REFUSED[row.name]:
        assert refusal(config, world_size) is row
        with pytest.raises(ConfigError) as caught:
            check(config, world_size)
        assert advice in str(caught.value) and "{" not in str(caught.value)
        mended = deepcopy(config)
        for key, value in change.items():
            *groups, name = key.split("__")
            if groups:
                setattr(attrgetter(".".join(groups))(mended), name, value)
        other = refusal(mended, change.get("world", world_size))
        assert other is not row, str(caught.value)
        assert other is None or row.name in ("tensor_cuts", "sequence_cut"), (row.name, other)


DEGREE = re.compile(r"parallel\.(tp|cp|pp|dp_replicate)=(\d+)(?: or (\d+))?(?=, or |$)")


def test_advised_degrees_make_the_job_legal_wherever_one_does():
    """The values after the reason, whichever row refuses; so do the advised numbers of ranks."""
    draw, advised = random.Random(1), 0
    for _ in range(2000):
        config = native(
            parallel__tp=draw.choice((1, 2, 3, 4, 6, 8)),
            parallel__pp=draw.choice((1, 1, 2, 3, 8)),
            parallel__cp=draw.choice((1, 1, 2, 8)),
            parallel__dp_replicate=draw.choice((1, 1, 3)),
            model__num_heads=draw.choice((4, 8, 12)),
            train__global_batch_size=draw.choice((8, 64)),
        )
        world_size = draw.choice((4, 6, 8, 12, 48))
        try:
            check(config, world_size)
            continue
        except ConfigError as error:
            reason, _, advice = str(error).rpartition("; ")
        row = refusal(config, world_size)
        for degree, *values in DEGREE.findall(advice):
            jobs = {value: with_degree(config, degree, value) for value in divisors(world_size)}
            one_is_legal = any(is_legal(mended, world_size) for mended in jobs.values())
            for value in map(int, filter(None, values)):
                assert is_legal(jobs[value], world_size) or not one_is_legal, (reason, degree, value)
                assert refusal(jobs[value], world_size) is not row, (reason, degree, value)
                advised += 1
        for count in re.findall(r"\d+", advice.partition("start ")[2].partition(" ranks")[0]):
            assert is_legal(config, int(count)), (reason, count)
            advised += 1
    assert advised > 300


def with_degree(config, degree, value):
    changed = deepcopy(config)
    setattr(changed.parallel, degree, value)
    return changed


def test_everything_else_is_legal():
    """fp32 and bf16 with fp32 sums run at every stage on any number of ranks, but for DeepSpeed's stage 0 in bf16."""
    for world_size, zero, precision in product((1, 2, 4, 8), (0, 1, 2, 3), ("fp32", "bf16")):
        row = refusal(job(zero=zero, precision=precision), world_size)
        assert (row is not None) == (zero == 0 and precision == "bf16")
        assert refusal(native(zero=zero, precision=precision), world_size) is None
    assert refusal(native(precision="fp16"), 1) is None


def test_random_jobs_are_legal_or_refused_in_words():
    """Whatever the numbers, the table answers with a legal layout or with a message, and in a moment."""
    draw = random.Random(0)
    legal = 0
    for _ in range(1000):
        config = job(
            draw.choice(("native", "deepspeed")),
            draw.randrange(4),
            parallel__tp=draw.choice((1, 1, 2, 3, 4)),
            parallel__pp=draw.choice((1, 1, 2, 3)),
            parallel__cp=draw.choice((1, 1, 2, 5)),
            parallel__dp_replicate=draw.choice((1, 1, 2)),
            parallel__virtual_stages=draw.choice((1, 1, 2)),
            parallel__schedule=draw.choice(("gpipe", "1f1b", "interleaved_1f1b", "zbv_zero_bubble")),
            parallel__layers_per_stage=draw.choice(([], [], [3, 3])),
            parallel__cp_kind=draw.choice(("ulysses", "ring")),
            train__seq_len=draw.choice((1, 16, 250, 256)),
        )
        world_size = draw.choice((1, 2, 4, 8, 12, 65536))
        try:
            check(config, world_size)
            legal += 1
        except ConfigError as error:
            assert str(error)
    assert 30 < legal < 970


def test_a_layout_describes_itself():
    """The degrees are those of the world."""
    layout = Layout.of(job(zero=2), 4)
    assert (layout.dp, layout.zero, layout.dp_rank(3)) == (4, 2, 3)
    assert layout.describe() == "deepspeed dp=4 zero=2 fp32" and layout.to_dict()["world_size"] == 4
    config = native(parallel__tp=2, parallel__pp=2, parallel__cp=2)
    assert Layout.of(config, 16).describe() == "native dp=2 tp=2 cp=2 pp=2 zero=3 1f1b fp32"


@pytest.mark.parametrize(
    ("tp", "cp", "pp", "dp"), [(1, 1, 1, 1), (2, 1, 1, 4), (2, 2, 2, 2), (4, 1, 3, 2), (1, 5, 2, 3)]
)
def test_ranks_and_coordinates(tp, cp, pp, dp):
    """Tensor ranks are neighbours, pipeline ranks furthest apart; every coordinate has one rank and back."""
    config = native(parallel__tp=tp, parallel__cp=cp, parallel__pp=pp)
    layout = Layout.of(config, tp * cp * pp * dp)
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert places == sorted(places) and len(set(places)) == layout.world_size
    assert [layout.rank(place) for place in places] == list(range(layout.world_size))
    assert max(place.tp for place in places[:tp]) == tp - 1 and places[-1].pp == pp - 1
    assert [layout.dp_rank(rank) for rank in layout.readers] == list(range(dp))


def test_every_stage_is_held_once():
    """Looped schedules deal stages round, the V there and back: the first and the last stage meet on one rank."""
    for schedule, virtual, pp in [("1f1b", 1, 4), ("interleaved_1f1b", 3, 2), ("zbv_zero_bubble", 2, 3)]:
        config = native(parallel__pp=pp, parallel__virtual_stages=virtual, parallel__schedule=schedule)
        layout = Layout.of(config, pp)
        held = [layout.stages_of(rank) for rank in range(pp)]
        assert sorted(chain(*held)) == list(range(pp * virtual)) and all(part == sorted(part) for part in held)
        if schedule.startswith("zbv"):
            assert held[0] == [0, 2 * pp - 1]


@pytest.mark.parametrize(
    ("layers", "stages", "before", "after"), [(6, 2, 0.0, 0.0), (5, 2, 0.1, 1.4), (7, 3, 0.2, 2.6), (4, 4, 1.0, 3.0)]
)
def test_blocks_are_dealt_as_evenly_as_can_be(layers, stages, before, after):
    """No other split has a lighter heaviest stage; every stage has a block, and the order is the model's."""

    def heaviest(counts):
        loads = list(counts)
        loads[0] += before
        loads[-1] += after
        return max(loads)

    counts = balance_layers(layers, stages, before, after)
    others = [split for split in product(range(1, layers + 1), repeat=stages) if sum(split) == layers]
    assert sum(counts) == layers and min(counts) >= 1
    assert heaviest(counts) == min(heaviest(split) for split in others)


def test_a_split_can_be_given():
    """Balanced, the embedding and the head weigh in; given, it is taken as it is."""
    config = native(parallel__pp=2, model__vocab_size=20000)
    first, last = stage_layers(config, 2)
    assert len(first) > len(last) and (first.start, last.stop) == (0, 6)
    config.parallel.layers_per_stage = [1, 5]
    assert stage_layers(config, 2) == [range(0, 1), range(1, 6)]
    assert describe(config, Layout.of(config, 2)) == "native dp=1 pp=2 zero=3 1f1b fp32 (blocks 1+5)"


def test_the_table_needs_no_torch():
    """Checking a layout imports no torch."""
    code = "import sys, megatrain.parallel.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

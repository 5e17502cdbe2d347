"""The memory model's own consistency, without ranks; tests/parity/test_memory.py measures it."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import product

import pytest

from megatrain.config import ModelConfig, TrainConfig
from megatrain.parallel.layout import Layout
from megatrain.planner import memory, timeline
from megatrain.planner.candidates import Axes, judge
from megatrain.planner.memory import MemoryModel, in_flight


def job():
    config = TrainConfig()
    config.model = ModelConfig(
        num_layers=7, num_heads=8, num_kv_heads=4, hidden_size=64, ffn_size=192, vocab_size=1001, max_seq_len=256
    )
    config.train.global_batch_size, config.train.micro_batch_size = 64, 2
    return config


def test_the_largest_rank_is_found_without_asking_every_rank():
    """Native: exactly. Under DeepSpeed a rank's partition may touch larger parameters than the first rank's."""
    config = job()
    model, draw, seen = MemoryModel(config.model, config.optim), random.Random(0), 0
    for candidate, refusal, view in judge(config, 8, Axes()):
        if refusal is None and draw.random() < 0.2:
            layout = Layout.of(view, 8)
            most = max(model.of_rank(view, layout, rank).total for rank in range(8))
            largest = model.largest(view, layout).total
            assert largest == most if candidate.engine == "native" else largest >= 0.99 * most, candidate
            seen += 1
    assert seen > 100


def test_sharding_and_cutting_never_cost_memory_of_optimizer_states():
    """More shards or a higher stage hold no more than fewer. One process holds everything."""
    config = job()
    config.engine.name = "native"
    model = MemoryModel(config.model, config.optim)
    found = []
    for world, zero in ((1, 0), (2, 0), (2, 1), (4, 1), (4, 3), (8, 3)):
        config.parallel.zero = zero
        found.append(model.largest(config, Layout.of(config, world)).optimizer)
    assert found == sorted(found, reverse=True) and found[0] == found[1] and found[2] > found[3] == found[4] > found[5]


@pytest.mark.parametrize(
    ("masks", "changes"),
    [
        (0, {"launch.device": "cpu"}),
        (0, {"precision.name": "bf16"}),
        (0, {"precision.name": "bf16", "parallel.cp": 2}),
        (0, {"train.mask_documents": False, "parallel.cp": 2, "parallel.cp_kind": "ring"}),
        (0, {"train.mask_documents": False, "model.sliding_window": 128}),
        (1, {"train.mask_documents": False, "model.sliding_window": 64}),
        (2, {"precision.name": "bf16", "model.sliding_window": 64}),
        (2, {"precision.name": "bf16", "parallel.cp": 2, "parallel.cp_kind": "ring"}),
        (2, {"precision.name": "bf16", "model.head_size": 12}),
        (2, {"precision.name": "bf16", "model.dropout": 0.1}),
        (2, {}),
    ],
    ids=str,
)
def test_dense_masks_are_counted_where_attention_needs_them(masks, changes):
    """Each has T x T numbers in the compute format; two rows of documents need two."""
    config = job()
    config.train.seq_len, config.train.mask_documents = 128, True
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    model, layout = MemoryModel(config.model), Layout.of(config, 2)
    w = 2 if config.precision.name == "bf16" else 4
    assert memory._num_masks(config, layout) == masks
    masked = model.largest(config, layout).activations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_num_masks", lambda *_: 0)
        config.train.mask_documents &= masks == 0  # with neither mask nor documents, attention is plain
        unmasked = model.largest(config, layout).activations
    if masks == 0 or layout.cp > 1:  # otherwise each query head needs keys and values of its own, too
        assert masked - unmasked == masks * w * 128**2
    else:
        assert masked - unmasked > masks * w * 128**2


def most_in_flight(order):
    """The most (stage, micro-batch) pairs whose activations a rank holds at once."""
    held = most = 0
    for action in order:
        held += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
        most = max(most, held)
    return most


def test_activations_held_at_once():
    assert in_flight("gpipe", 4, 1, 8) == (((8,),),) * 4
    assert in_flight("1f1b", 4, 1, 8) == (((4,),), ((3,),), ((2,),), ((1,),))


@pytest.mark.parametrize(
    ("schedule", "virtual"),
    [
        ("1f1b", 1),
        ("interleaved_1f1b", 2),
        ("interleaved_1f1b", 3),
        ("interleaved_zero_bubble", 2),
        ("zbv_zero_bubble", 2),
    ],
)
def test_a_long_step_holds_no_more_than_a_short_one(schedule, virtual):
    """The number of micro-batches that is looked at is cut short; the answer is that of the whole order."""
    for pp, rounds in product((2, 3, 4), (2, 4, 5, 9)):
        number = pp * rounds
        held = in_flight(schedule, pp, virtual, number)
        for rank, order in enumerate(timeline.orders(schedule, pp, virtual, number)):
            assert max(map(sum, held[rank])) == most_in_flight(order), (pp, number, rank)


def test_counting_memory_needs_no_torch():
    code = "import sys, megatrain.planner.memory, megatrain.planner.candidates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

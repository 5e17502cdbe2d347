"""Which layers each pipeline stage has, and which stages each rank has. Imports no torch."""

from __future__ import annotations

from itertools import pairwise

from megatrain.config import ModelConfig, TrainConfig

LOOPED = ("interleaved_1f1b", "interleaved_zero_bubble")
"""Schedules with several stages per rank, dealt round-robin: rank r holds stages r, r + pp, r + 2 pp, ..."""

V_SHAPED = ("zbv_zero_bubble",)
"""Schedules with two stages per rank, in a V: rank r holds stages r and 2 pp - 1 - r."""

ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv_zero_bubble")
"""Schedules that split the backward pass into input gradients and weight gradients."""


def stages_of(schedule: str, pp: int, virtual_stages: int, pp_rank: int) -> list[int]:
    """Return the stages that a pipeline rank holds, in model order."""
    num_stages = pp * virtual_stages
    if schedule in V_SHAPED and pp > 1:
        return [pp_rank, num_stages - 1 - pp_rank]
    return list(range(pp_rank, num_stages, pp))


def stage_layers(config: TrainConfig, num_stages: int) -> list[range]:
    """Return the blocks of each pipeline stage: those of `parallel.layers_per_stage`, or balanced.

    Balanced means that the heaviest stage is as light as possible, with the embedding and the head counted in blocks.
    Each stage holds at least one block.
    """
    counts = list(config.parallel.layers_per_stage) or balance_layers(
        config.model.num_layers, num_stages, *end_loads(config.model)
    )
    edges = [sum(counts[:index]) for index in range(len(counts) + 1)]
    return [range(first, last) for first, last in pairwise(edges)]


def end_loads(model: ModelConfig) -> tuple[float, float]:
    """Return the work of the embedding and of the head, each relative to that of a block.

    Work is counted in matrix products. An embedding has none; a tenth of a head stands for the memory traffic of its
    row gradients.
    """
    heads = (2 * model.num_heads + 2 * model.kv_heads) * model.head_dim
    mlp = (3 if model.gated else 2) * model.ffn_dim
    head = model.vocab / (heads + mlp) if model.vocab_size else 0.0
    return 0.1 * head, head


def balance_layers(num_layers: int, num_stages: int, first_load: float, last_load: float) -> list[int]:
    """Return the number of blocks of each stage, at least one; the end stages have extra loads, in blocks.

    Each block goes to the lightest stage so far; ties go to the earliest.
    """
    counts = [1] * num_stages
    loads = [1.0] * num_stages
    loads[0] += first_load
    loads[-1] += last_load
    for _ in range(num_layers - num_stages):
        lightest = min(range(num_stages), key=lambda stage: loads[stage])
        counts[lightest] += 1
        loads[lightest] += 1
    return counts

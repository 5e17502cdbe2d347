"""`parallel.*`: how the job is split over ranks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class ParallelConfig:
    """How the job is split. The data-parallel degree is the number of ranks / (tp x pp x cp)."""

    tp: int = key(1, "tensor-parallel degree: ranks that share each layer's matrices and heads", minimum=1)
    pp: int = key(1, "pipeline-parallel degree: ranks that hold successive layers", minimum=1)
    cp: int = key(1, "context-parallel degree: ranks that share each sequence", minimum=1)
    zero: int = key(
        3,
        "ZeRO stage: 0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too",
        choices=(0, 1, 2, 3),
    )
    dp_replicate: int = key(
        1,
        "hybrid sharding: replicas of the sharded state, each over its own group of data-parallel ranks; 1 "
        "shards over all",
        minimum=1,
    )
    schedule: str = key(
        "1f1b",
        "pipeline schedule: the order in which stages run micro-batches",
        choices=("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"),
    )
    virtual_stages: int = key(
        1, "pipeline stages per rank (interleaved schedules need 2 or more, zbv_zero_bubble 2)", minimum=1
    )
    layers_per_stage: list[int] = key(
        [], "transformer blocks in each pipeline stage, first to last; empty balances them", each_minimum=0
    )
    cp_kind: str = key(
        "ulysses",
        "context parallelism: ulysses exchanges heads for sequence (all-to-all), ring passes keys and values around",
        choices=("ulysses", "ring"),
    )

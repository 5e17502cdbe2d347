"""Print a table of the memory that ranks hold, summed from their tensors, beside the formula of megatrain/planner.

    python tests/measure/memory.py

The layouts are those of tests/parity/test_memory.py, which bounds the deviations. A cell has the bytes of the rank that
holds most, and the largest deviation of the formula over all ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/support and tests/parity

from parity.test_memory import BUCKET, CASES, PATCH, job
from support.holdings import held_in_a_step
from support.ranks import run_ranks

from megatrain.parallel.layout import Layout
from megatrain.planner.memory import DeepSpeedSizes, MemoryModel

KINDS = ("parameters", "gradients", "optimizer", "activations")
SHOWN = ("cp_kind", "dp_replicate", "recompute", "seq_len", "documents", "window")


def main() -> None:
    """Print one line a layout."""
    print("| ranks | model, layout | " + " | ".join(KINDS) + " |")
    print("| ---: | --- | " + "---: | " * len(KINDS))
    for world, changes in CASES:
        config = job(world, **changes)
        layout = Layout.of(config, world)
        model = MemoryModel(config.model, config.optim, DeepSpeedSizes(reduce_bucket=BUCKET, persistence_threshold=0))
        held = run_ranks(held_in_a_step, world, config, PATCH, timeout_s=300)
        formula = [model.of_rank(config, layout, rank) for rank in range(world)]
        cells = []
        for kind in KINDS:
            off = [getattr(memory, kind) / rank[kind] - 1 for rank, memory in zip(held, formula, strict=True)]
            cells.append(f"{max(rank[kind] for rank in held):,} ({max(off, key=abs):+.1%})")
        parts = [f"{key}={changes[key]}" for key in SHOWN if key in changes]
        name = " ".join([changes.get("family", "llama"), layout.describe(), *parts])
        print(f"| {world} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""`train.*`: steps, batch sizes, evaluation inside the loop. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class TrainLoopConfig:
    """Sizes of the loop."""

    steps: int = key(100, "optimizer steps of the whole run", minimum=1)
    global_batch_size: int = key(8, "sequences a step over the whole job", minimum=1)
    micro_batch_size: int = key(4, "sequences a rank runs at once", minimum=1)
    seq_len: int = key(256, "tokens a sequence", minimum=1)
    batch_ramp_start: int | None = key(
        None, "sequences of the first steps; null starts at global_batch_size", minimum=1
    )
    batch_ramp_increment: int = key(1, "sequences added each time the ramp rises", minimum=1)
    batch_ramp_steps: int = key(0, "steps until the ramp reaches global_batch_size", minimum=0)
    eval_every: int = key(
        0, "steps between held-out evaluations inside the loop; 0 evaluates only at the end", minimum=0
    )
    eval_steps: int | None = key(
        None, "held-out batches (of global_batch_size) an evaluation reads; null reads all", minimum=1
    )
    early_stop_patience: int = key(
        0, "evaluations without a better held-out loss before the run ends; 0 never", minimum=0
    )
    early_stop_min_delta: float = key(
        0.0, "smallest drop of the held-out loss that counts as better, in nats", minimum=0
    )
    recompute: str = key(
        "none",
        "activations recomputed in the backward pass: none; selective, all but matrix products and attention; full, "
        "all inside a block",
        choices=("none", "selective", "full"),
    )
    mask_documents: bool = key(
        False, "whether a token attends to its own document alone; false: to all before it in its sequence"
    )
    skip_ranges: list[list[int]] = key(
        [], "samples to pass over from the start, as [start,stop) pairs of their numbers in the run's order"
    )

"""`train.*`: steps, batch sizes, evaluation during training. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatrain.config.key import key


@dataclass
class TrainLoopConfig:
    """Steps, batch sizes, and evaluation during training."""

    steps: int = key(100, "optimizer steps of the whole run", minimum=1)
    global_batch_size: int = key(8, "sequences per optimizer step, over the whole job", minimum=1)
    micro_batch_size: int = key(4, "sequences that a rank processes at once", minimum=1)
    seq_len: int = key(256, "tokens per sequence", minimum=1)
    batch_ramp_start: int | None = key(
        None, "sequences per step at the start of a batch-size ramp; null has no ramp", minimum=1
    )
    batch_ramp_increment: int = key(1, "sequences added with each increase of the ramp", minimum=1)
    batch_ramp_steps: int = key(0, "steps until the ramp reaches global_batch_size", minimum=0)
    eval_every: int = key(0, "steps between held-out evaluations; 0 evaluates only at the end", minimum=0)
    eval_steps: int | None = key(
        None, "held-out batches (of global_batch_size sequences) per evaluation; null reads all", minimum=1
    )
    tasks: list[str] = key([], "tasks of lm-evaluation-harness to score during training (needs megatrain[evaluate])")
    tasks_dir: str | None = key(
        None, "folder of task files (.yaml) of your own; without train.tasks all of them are scored", path=True
    )
    tasks_every: int = key(0, "steps between scores on tasks; 0 scores them only at the end", minimum=0)
    tasks_limit: int | None = key(100, "documents of each task to score, the first ones; null takes all", minimum=1)
    early_stop_patience: int = key(
        0, "consecutive evaluations without a better held-out loss that end the run; 0 never ends it", minimum=0
    )
    early_stop_min_delta: float = key(
        0.0, "smallest decrease of the held-out loss that counts as better, in nats", minimum=0
    )
    recompute: str = key(
        "none",
        "activations to recompute in the backward pass: none; selective, all but matrix products and attention; "
        "full, all inside a block",
        choices=("none", "selective", "full"),
    )
    mask_documents: bool = key(
        False, "let a token attend only to its own document; false lets it attend to all earlier tokens of its sequence"
    )
    reset_positions: bool = key(
        False, "count positions from the beginning of each document; only with train.mask_documents=true"
    )
    skip_ranges: list[list[int]] = key(
        [], "samples to skip, as [start,stop) pairs of sample numbers in the run's order"
    )

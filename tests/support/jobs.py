"""Small training jobs that the parity tests run on several ranks: configs, and batches that depend only on the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatrain.config import ModelConfig, TrainConfig
from megatrain.data.batch import MicroBatch
from megatrain.data.loader import micro_batch_of, padded_ids, with_documents
from megatrain.data.samples import Sample
from megatrain.engine.build import build_engine
from megatrain.engine.protocol import Engine
from megatrain.kernels import IGNORE_INDEX
from megatrain.parallel.layout import Layout
from support.records import at

VOCAB = 101  # not divisible by any number of ranks
SEQ_LEN = 16
END_OF_DOCUMENT = 5
GLOBAL_BATCH = 16

MIXED = dict(
    norm_place="after",
    activation="geglu",
    attention_bias="qkv",
    embedding_scale=2.5,
    sliding_window=3,
    rope_scaling="llama3",
    rope_factor=8,
    rope_original_seq_len=4,
)
"""What a model may have besides the two usual shapes, as far as it goes together."""


def llama(**changes: Any) -> ModelConfig:
    """Return a Llama-shaped model of odd sizes."""
    shape = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 24, "head_size": 6, "ffn_size": 37}
    return ModelConfig(**{**shape, "vocab_size": VOCAB, "max_seq_len": SEQ_LEN, **changes})


def gpt2(**changes: Any) -> ModelConfig:
    """Return a GPT-2-shaped model: learned positions, biases, LayerNorm, tied embeddings."""
    shape = {"num_layers": 3, "num_heads": 3, "hidden_size": 24, "norm": "layernorm", "position": "learned"}
    # at this width the usual 0.02 leaves some gradients near Adam's epsilon, where it would amplify rounding
    family = {"activation": "gelu", "bias": True, "tie_embeddings": True, "init_std": 0.1}
    return ModelConfig(**{**shape, **family, "vocab_size": VOCAB, "max_seq_len": SEQ_LEN, **changes})


def job(
    engine: str = "deepspeed",
    zero: int = 3,
    micro: int = 4,
    model: ModelConfig | None = None,
    precision: str = "fp32",
    accumulate: str = "fp32",
    **train: Any,
) -> TrainConfig:
    """Return the config of a job over `GLOBAL_BATCH` sequences a step."""
    config = TrainConfig()
    config.model = model or llama()
    config.engine.name, config.launch.device = engine, "cpu"
    config.parallel.zero = zero
    config.precision.name, config.precision.accumulate_dtype = precision, accumulate
    config.train.micro_batch_size, config.train.global_batch_size = micro, GLOBAL_BATCH
    config.train.seq_len = SEQ_LEN
    config.optim.lr = 1e-3
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


def batches(config: TrainConfig, step: int, rank: int, ranks: int, ignored: bool = False) -> list[MicroBatch]:
    """Return one rank's micro-batches of a step; with `ignored`, an uneven number of labels is ignored."""
    generator = torch.Generator().manual_seed(1000 + step)
    sequences = config.train.global_batch_size
    ids = torch.randint(0, VOCAB, (sequences, config.train.seq_len + 1), generator=generator)
    labels = ids[:, 1:].clone()
    if ignored:
        labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.9, sequences)[:, None]] = (
            IGNORE_INDEX
        )
    size = config.train.micro_batch_size
    chosen = [
        slice((index * ranks + rank) * size, (index * ranks + rank + 1) * size)
        for index in range(sequences // (size * ranks))
    ]
    end = END_OF_DOCUMENT if config.train.mask_documents else None
    if config.data.packing == "best_fit":
        samples = [packed_sample(row, generator) for row in ids.numpy()]
        padded = padded_ids(samples, config.train.seq_len)
        return [micro_batch_of(samples[rows], padded[rows], end, config.train.reset_positions) for rows in chosen]
    if end is not None:
        ids[ids < VOCAB // 6] = end
    return [with_documents(ids[rows, :-1].contiguous(), labels[rows].contiguous(), end) for rows in chosen]


def packed_sample(ids: np.ndarray, generator: torch.Generator) -> Sample:
    """Return a sample of whole and cut documents in the first of some ids: a third of them at least."""
    filled = int(torch.randint(len(ids) // 3, len(ids) + 1, (), generator=generator))
    ends = torch.randperm(filled - 1, generator=generator)[:3].sort().values + 1
    pieces = np.diff([0, *ends.tolist(), filled]).tolist()
    return Sample(ids[:filled], pieces, (int(ends[0]) - 1,))


def train(
    engine: Engine, config: TrainConfig, rank: int, ranks: int, first: int, last: int, ignored: bool = False
) -> list[tuple[float, float]]:
    """Run steps `first` to `last` and return their (loss, gradient norm)."""
    seen = []
    for step in range(first, last + 1):
        result = engine.train_step(batches(config, step, rank, ranks, ignored), config.optim.lr, step)
        assert bool(result.updated)
        seen.append((float(result.loss_sum) / int(result.tokens), float(result.grad_norm)))
    return seen


def gather(engine: Engine, folder: Path, world: Any) -> dict[str, torch.Tensor]:
    """Save an engine's state as a checkpoint and return it, every tensor whole, by name."""
    from megatrain.checkpoint.store import CheckpointStore, load_into, verify

    store = CheckpointStore(folder, world)
    saved = store.save(engine.state(), at(1, engine.counters()))
    manifest = verify(saved)
    whole = {name: torch.empty(tensor.shape) for name, tensor in manifest.tensors.items()}
    load_into(saved, manifest, whole, None)
    return whole


def wide_llama(**changes: Any) -> ModelConfig:
    """Return a Llama-shaped model for 2 and 4 tensor ranks, with 5 blocks and a vocabulary that neither divides."""
    shape = {"num_layers": 5, "num_heads": 8, "num_kv_heads": 4, "hidden_size": 32, "head_size": 4, "ffn_size": 40}
    return llama(**{**shape, "init_std": 0.1, **changes})


def wide_gpt2(**changes: Any) -> ModelConfig:
    """Return a GPT-2-shaped model (tied, biases, learned positions) for 2, 4 and 8 tensor ranks."""
    return gpt2(**{"num_layers": 5, "num_heads": 8, "hidden_size": 32, **changes})


def layout_job(
    engine: str = "native",
    family: str = "llama",
    micro: int = 1,
    compile: bool = False,
    recompute: str = "none",
    **parallel: Any,
) -> TrainConfig:
    """Return the config of a job with the given `parallel.*` keys.

    Adam's epsilon is 1e-6: with 1e-8 its first steps turn a gradient of pure rounding error into an update as large as
    the learning rate, even on one process with other micro-batches.
    """
    model = wide_llama() if family == "llama" else wide_gpt2()
    config = job(engine, parallel.pop("zero", 0), micro, model, recompute=recompute)
    config.optim.eps = 1e-6
    config.compile = compile
    for name, value in parallel.items():
        setattr(config.parallel, name, value)
    return config


def rows(changes: dict[str, Any], ranks: int) -> int:
    """Return the micro-batch size with which a layout runs two micro-batches a step for each pipeline stage."""
    stages, exchanging = changes.get("pp", 1), changes.get("tp", 1) * changes.get("cp", 1)
    data_ranks = ranks // (stages * exchanging)
    return GLOBAL_BATCH // (2 * stages * data_ranks)


STEPS = 3
LIMITS = {
    "start": 0.0,
    "loss": 1e-5,
    "grad_norm": 1e-4,
    "first_gradient": 1e-5,
    "parameter": 1e-5,
    "heldout_loss": 1e-5,
}
"""Largest deviation from one process that a layout may have; see `deviations`."""


def parity_steps(world: Any, config: TrainConfig, folder: str, steps: int = STEPS) -> Any:
    """Run `steps` steps with an uneven number of ignored labels; return what each rank's engine reported, the
    held-out loss, and the gathered states."""
    engine = build_engine(config, world)
    layout = Layout.of(config, world.size)

    def data(step: int) -> list[MicroBatch]:
        return batches(config, step, layout.dp_rank(world.rank), layout.dp, ignored=True)

    reported, states = [], [gather(engine, Path(folder) / "start", world)]
    for step in range(1, steps + 1):
        result = engine.train_step(data(step), config.optim.lr, step)
        reported.append((float(result.loss_sum) / int(result.tokens), float(result.grad_norm), int(result.tokens)))
        if step in (1, steps):
            states.append(gather(engine, Path(folder) / str(step), world))
    loss_sum, tokens = engine.evaluate(data(99))
    return reported, (float(loss_sum) / int(tokens), int(tokens)), states if world.rank == 0 else None


def deviations(results: list[Any], expected: Any) -> dict[str, float]:
    """Return how far `parity_steps` of a layout deviate from one process.

    `loss`, `grad_norm` and `heldout_loss`: the largest relative difference; `first_gradient`: of each parameter
    relative to its largest element (the first moment after one step is the clipped gradient times 1 - beta1);
    `parameter`: absolute, after the last step; `start`: absolute, 0 where all initial bits are equal. Key biases are
    left out: their true gradient is zero. If ranks report different numbers or token counts, the deviation is
    infinite.
    """
    reported, held_out, states = results[0]
    true_reported, true_held_out, true_states = expected
    tokens = [[entry[2] for entry in run] for run in (reported, true_reported)]
    agreed = all(other[:2] == (reported, held_out) for other in results[1:]) and tokens[0] == tokens[1]
    if not agreed or held_out[1] != true_held_out[1] or states[0].keys() != true_states[0].keys():
        return dict.fromkeys(LIMITS, float("inf"))

    def relative(values: list[float], true: list[float]) -> float:
        return max(abs(value / other - 1) for value, other in zip(values, true, strict=True))

    def furthest(index: int, prefix: str | tuple[str, ...], scaled: bool = False) -> float:
        found = [0.0]
        for key, tensor in true_states[index].items():
            if key.startswith(prefix) and not (index and key.endswith("k.bias")):
                difference = (states[index][key] - tensor).abs().max()
                found.append(float(difference / tensor.abs().max().clamp(min=1e-30) if scaled else difference))
        return max(value if value == value else float("inf") for value in found)

    return {
        "start": furthest(0, ""),
        "loss": relative([entry[0] for entry in reported], [entry[0] for entry in true_reported]),
        "grad_norm": relative([entry[1] for entry in reported], [entry[1] for entry in true_reported]),
        "first_gradient": furthest(1, "optim.exp_avg.", scaled=True),
        "parameter": furthest(2, ("model.", "critic.")),
        "heldout_loss": relative([held_out[0]], [true_held_out[0]]),
    }


def compare(results: list[Any], expected: Any) -> None:
    """Check that every deviation is within `LIMITS`."""
    for name, value in deviations(results, expected).items():
        assert value <= LIMITS[name], (name, value)

"""`megatrain evaluate` on preference pairs: how often a model prefers the chosen reply, and its loss."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from megatrain.config import EvaluateConfig, MethodConfig
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import count_windows, heldout_batches
from megatrain.distributed.devices import device_by_name
from megatrain.engine.common import measure
from megatrain.errors import DataError
from megatrain.interop.load_model import Loaded
from megatrain.kernels.choice import choose
from megatrain.optim.objective import LossMeter, Objective
from megatrain.optim.preferences import DirectPreference, PairReward, ReferenceTable
from megatrain.training.evaluation import Evaluation
from megatrain.training.protocols import WeightedSource
from megatrain.training.reference import read_reference

SHOWN = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "sft_loss")


class _Pairs:
    """The one source of an evaluation on pairs."""

    source, weight, bytes_per_token = "", 1.0, None


def evaluate_pairs(config: EvaluateConfig, loaded: Loaded, dataset: IndexedDataset, seq_len: int) -> dict[str, Any]:
    """Return the scores of a model on pairs, with standard errors (`<name>_se`).

    A reward model has loss and accuracy: the share of pairs whose chosen reply gets the higher reward. A language model
    is compared with the reference that its run kept of this dataset, and has the loss of `method=dpo` then; without
    one, accuracy is the share of pairs whose chosen reply is likelier, and there is no loss.

    Raises:
        DataError: no pair fits into the sequence length, or a file is damaged.
    """
    device = device_by_name(config.device)
    mode = "reference" if loaded.run_config().get("kernels") == "reference" else "auto"
    model = loaded.build(device, choose(mode, device, torch.float32, loaded.config.hidden_size, compiled=False))
    objective, reference = _objective(loaded, dataset, device)
    num_batches = -(-count_windows(dataset, seq_len) // config.batch_size)
    if config.max_batches is not None:
        num_batches = min(num_batches, config.max_batches)
    assert dataset.card.tokenizer is not None, "pairs are laid out by a tokenizer"
    batches = heldout_batches(
        dataset,
        seq_len=seq_len,
        micro_batch_size=config.batch_size,
        dp_rank=0,
        dp_size=1,
        max_samples=num_batches * config.batch_size,
        vocab_size=loaded.config.vocab,
        end_of_document=dataset.card.tokenizer.end_of_document,
        reset_positions=True,
    )
    started = time.perf_counter()
    loss_sum, count, *sums = measure(model, batches, device, LossMeter(objective, device)).tolist()
    if not count:
        raise DataError(f"{dataset.name}: no pair fits into seq_len={seq_len}; give a larger one")
    total, share = Evaluation(), _Pairs()
    scalars = {name: value / count for name, value in zip(objective.scalar_names, sums, strict=True)}
    source: WeightedSource = share
    total.add(source, loss_sum, int(count), scalars)
    scores = {"loss": total.loss, **total.scores()}
    if reference is None:
        scores = {name: value for name, value in scores.items() if name in ("accuracy", "accuracy_se", "sft_loss")}
    return {
        "checkpoint": str(loaded.folder),
        "step": loaded.manifest.step if loaded.manifest else None,
        "data": f"{dataset.folder} ({dataset.split})",
        "seq_len": seq_len,
        "pairs": int(count),
        "reference": reference,
        **scores,
        "seconds": time.perf_counter() - started,
    }


def _objective(loaded: Loaded, dataset: IndexedDataset, device: torch.device) -> tuple[Objective, str | None]:
    """Return the objective, and what its loss compares with (None: nothing, so that it has no meaning)."""
    known = asdict(MethodConfig())
    method = known | {key: x for key, x in loaded.run_config().get("method", {}).items() if key in known}
    if loaded.config.output == "score":
        return PairReward(method["margin"], method["centering"]), "the rejected reply"
    table = read_reference(loaded.folder.parent.parent, dataset.fingerprint)
    if table is not None:
        values = torch.from_numpy(table).to(device)
        kept = ReferenceTable(values)
        return DirectPreference(method["beta"], method["label_smoothing"], method["sft_weight"], kept), "the run's base"
    documents = sum(split.documents for split in dataset.card.splits.values())
    return DirectPreference(1.0, 0.0, 0.0, ReferenceTable(torch.zeros((documents, 2), device=device))), None


def print_pairs(result: dict[str, Any]) -> None:
    """Print a summary for people."""
    lines = [f"{result['checkpoint']} on {result['data']}", f"  pairs            {result['pairs']:,}"]
    for name in SHOWN:
        if (value := result.get(name)) is not None and math.isfinite(value):
            error = f" ± {result[f'{name}_se']:.4f}" if f"{name}_se" in result else ""
            lines.append(f"  {name.replace('_', ' '):16} {value:.6f}{error}")
    print("\n".join(lines), file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)

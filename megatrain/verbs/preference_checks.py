"""Checks of runs that learn from preferences: the model's output, the data, and pairs that are too long."""

from __future__ import annotations

import sys
from pathlib import Path

from megatrain.config import TrainConfig
from megatrain.data.card import Card
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.mixture_settings import MIXED
from megatrain.data.packing_index import open_packing
from megatrain.errors import ConfigError, DataError

PAIR_METHODS = ("reward", "dpo")
"""Methods that learn from preference pairs."""


def check_output(config: TrainConfig) -> None:
    """Check that the method, the model's output and the kind of data go together. Raises ConfigError."""
    method, scores = config.method.name, config.model.output == "score"
    if scores and method != "reward":
        raise ConfigError(
            f"method={method}: the model is a reward model (model.output=score), which writes nothing; begin from a "
            "language model, or use method=reward"
        )
    if method == "reward" and not scores:
        raise ConfigError("method=reward: a reward model has model.output=score; leave model.output out")
    if method in PAIR_METHODS and config.data.kind in MIXED:
        raise ConfigError(
            f"method={method} learns from one dataset of pairs, not from data={config.data.kind}; prepare all pairs as "
            "one: data=pairs 'data.paths=[a.jsonl,b.jsonl]'"
        )


def check_pairs(config: TrainConfig, card: Card) -> None:
    """Check that a run's dataset is of the kind that its method learns from, and that its pairs fit into a window.

    Raises:
        ConfigError: the method learns from pairs and the dataset has none, or the other way round.
        DataError: pairs are too long, and `data.on_bad_record` does not say to leave them out; or all are.
    """
    folder, method = Path(config.data.dir) / config.data.name, config.method.name
    if card.has_pairs != (method in PAIR_METHODS):
        if card.has_pairs:
            raise ConfigError(f"method={method}: {folder} has preference pairs; use method={' or '.join(PAIR_METHODS)}")
        raise ConfigError(f"method={method} learns from preference pairs, which {folder} has not; prepare data=pairs")
    if not card.has_pairs:
        return
    seq_len = config.train.seq_len
    for split in card.splits:
        dataset = IndexedDataset.of_card(folder, split, card, config.data.verify)
        packed = open_packing(dataset, seq_len, config.data.verify).card
        if not packed.cut:
            continue
        longest = max(int(lengths.max()) for lengths in dataset.lengths())
        what = (
            f"{packed.cut:,} of {packed.documents:,} pairs of {dataset.name} have more than train.seq_len={seq_len} "
            f"tokens on both sides together (the longest {longest - 1:,})"
        )
        if packed.cut == packed.documents or config.data.on_bad_record == "stop":
            raise DataError(f"{what}; raise train.seq_len, or leave them out with data.on_bad_record=skip")
        print(f"note: {what}; they are left out", file=sys.stderr)

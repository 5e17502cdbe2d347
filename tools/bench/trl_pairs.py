"""Preference pairs that megatrain and TRL read alike, for the test of losses and gradients and for tune_dpo.py.

Here are a tokenizer with a chat template, and the dataset of the pairs. Models, trainers and comparisons are not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.batch import MicroBatch
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import heldout_batches
from megatrain.data.preparation import prepare
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TRL_OPTIONS: dict[str, Any] = dict(
    bf16=False, use_cpu=True, report_to="none", activation_checkpointing=False, disable_tqdm=True
)
"""Options with which TRL's trainers compute in fp32 on the CPU and print nothing."""

Pair = dict[str, list[dict[str, str]]]


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    """Return a record of a pair, as conversations of one turn."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def make_tokenizer(place: Path, rows: Sequence[Pair], vocab_size: int) -> Any:
    """Train a tokenizer on the pairs, keep it in `place/tokenizer`, and return it as transformers reads it."""
    (place / "template.jinja").write_text(TEMPLATE)
    words = TokenizerConfig(kind="byte_level_bpe", vocab_size=vocab_size, chat_template=str(place / "template.jinja"))
    words.special_tokens = ["<|user|>", "<|assistant|>", "<|end|>"]
    train_byte_level_bpe((json.dumps(row) for row in rows), words).save(place / "tokenizer")
    return transformers.AutoTokenizer.from_pretrained(place / "tokenizer")


def make_dataset(place: Path, name: str, rows: Sequence[Pair]) -> None:
    """Prepare the dataset `place/<name>` of the pairs with the tokenizer in `place`."""
    path = place / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(name=name, dir=str(place), kind="pairs", paths=[str(path)], workers=1, heldout_fraction=0)
    tokens = TokenizerConfig(kind="hf", path=str(place / "tokenizer"))
    prepare(PrepareConfig(seed=1, data=data, clean=CleanConfig(), tokenizer=tokens))


def read_batches(folder: Path, rows: int, seq_len: int) -> list[MicroBatch]:
    """Return the pairs of a dataset in order, as micro-batches of `rows` packed rows."""
    dataset = IndexedDataset.open(folder, "train")
    assert dataset.card.tokenizer is not None
    end = dataset.card.tokenizer.end_of_document
    options: dict[str, Any] = dict(dp_rank=0, dp_size=1, end_of_document=end, reset_positions=True)
    return list(heldout_batches(dataset, seq_len=seq_len, micro_batch_size=rows, **options))

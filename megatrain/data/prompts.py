"""The prompts of a dataset that was prepared with `data=prompts`, by their numbers. Imports no torch."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from megatrain.data.card import Card
from megatrain.data.chat.prompt import Prompt, decode_prompt
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.errors import ConfigError, DataError

KIND = "prompts"


def holds_prompts(card: Card) -> bool:
    """Return whether a dataset's documents are prompts with fields for rewards."""
    return bool(card.config.get("data", {}).get("kind") == KIND)


def check_prompts(card: Card, folder: Path, method: str) -> None:
    """Refuse a dataset without prompts. Raises ConfigError."""
    if not holds_prompts(card):
        raise ConfigError(
            f"data.name={card.name}: method={method} needs prompts, and {folder} was prepared with "
            f"data={card.config.get('data', {}).get('kind', 'megatron')}; prepare a JSONL of prompts with data=prompts"
        )


class Prompts:
    """The prompts of a split. What is read was verified first, like any dataset."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self.dataset = dataset
        lengths = np.concatenate(list(dataset.lengths()))
        self._stops = np.cumsum(lengths, dtype=np.int64)
        self._starts = self._stops - lengths

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, number: int) -> Prompt:
        """Return a prompt. Raises `DataError` if the data is damaged."""
        start, count = int(self._starts[number]), int(self._stops[number] - self._starts[number])
        counts = self.dataset.counts(start, count)
        assert counts is not None
        try:
            return decode_prompt(self.dataset.read(start, count), counts)
        except (ValueError, KeyError) as error:
            raise DataError(f"{self.dataset.name}: prompt {number} is damaged ({error})") from error

    @cached_property
    def fields(self) -> list[str]:
        """The names of the fields that every prompt has, sorted."""
        common = set(self.read(0).fields)
        for number in range(1, len(self)):
            common &= set(self.read(number).fields)
        return sorted(common)

    def check(self, seq_len: int, max_new_tokens: int, vocab_size: int, skip: bool = False) -> int:
        """Refuse prompts that leave no room for a reply of the largest length, and ids outside the vocabulary.

        With `skip` such prompts are left out instead, unless all are. Returns how many were. Raises ConfigError with
        the longest prompt, or DataError.
        """
        counts = self.dataset.counts(0, self.dataset.num_tokens)
        assert counts is not None
        before = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        lengths = before[self._stops] - before[self._starts]
        longest = int(lengths.argmax())
        fits = lengths <= seq_len + 1 - max_new_tokens
        too_long = int((~fits).sum())
        if too_long and not (skip and fits.any()):
            raise ConfigError(
                f"train.seq_len={seq_len}: {too_long} of {len(self)} prompts leave no room for "
                f"method.max_new_tokens={max_new_tokens}; the longest has {lengths[longest]} tokens and begins "
                f"{str(self.read(longest).prompt)[:60]!r}; give train.seq_len={lengths[longest] + max_new_tokens - 1} "
                f"or more, fewer new tokens, or data.on_bad_record=skip to leave them out"
            )
        ids = self.dataset.read(0, self.dataset.num_tokens)[counts]
        if int(ids.max()) >= vocab_size:
            raise DataError(
                f"{self.dataset.name}: token id {int(ids.max())} is outside the vocabulary of {vocab_size}; prepare "
                "the prompts with the tokenizer of the model"
            )
        self._starts, self._stops = self._starts[fits], self._stops[fits]
        return too_long

"""The prepared datasets of a mixture: their cards, checked against one another, and the samples of all.

Opening reads cards alone, and with data.packing=best_fit each source's packing, which is made if it is missing. The
files of a source are opened when it is first read. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from megatrain.config import DataConfig, TrainConfig, TrainLoopConfig
from megatrain.config.suggest import did_you_mean
from megatrain.data.card import CARD, Card, card_of_parts, check_dataset
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.mixture import MixturePlan, PlannedSource, first_windows
from megatrain.data.mixture_settings import PhaseSetting, SourceSetting, make_plan, read_phases
from megatrain.data.samples import PackedSamples, Sample, Windows, num_samples, open_samples
from megatrain.errors import ConfigError, DataError

_MAX_OPEN = 64
"""Sources whose files are open at once; a process may often open no more than 1,024 files."""


@dataclass(frozen=True)
class Mixture:
    """A run's mixture: its settings, its plan, and the folder and the card of each source by name."""

    phases: list[PhaseSetting]
    plan: MixturePlan
    folders: dict[str, Path]
    cards: dict[str, Card]

    @property
    def folder(self) -> Path:
        """The folder of the first source; all have its tokenizer."""
        return next(iter(self.folders.values()))

    def card(self, name: str) -> Card:
        """Return a card of the whole: the fingerprint of the plan, the common tokenizer, and the sizes together."""
        splits = {}
        for split in ("train", "heldout"):
            if parts := [card.splits[split] for card in self.cards.values() if split in card.splits]:
                splits[split] = replace(card_of_parts(parts), parts=[])
        sources = {source: card.fingerprint for source, card in self.cards.items()}
        tokenizer = next((card.tokenizer for card in self.cards.values()), None)
        return Card(name, self.plan.fingerprint, splits, tokenizer, source={"sources": sources})

    def continued(self, plan: MixturePlan) -> Mixture:
        """Return the mixture with the plan that a resumed run continues."""
        return replace(self, plan=plan)


def open_mixture(config: TrainConfig, samples_before: Callable[[TrainLoopConfig, int], int]) -> Mixture | None:
    """Read the cards of a run's mixture and plan it; None if the run is on one dataset.

    `samples_before` returns how many samples precede a step (`optim/schedule.py`).

    Raises:
        ConfigError: a dataset is missing or was made with another tokenizer, or a setting is wrong. Names the key.
        DataError: a dataset is damaged, or too short for one sample.
    """
    phases = read_phases(config.data)
    if not phases:
        return None
    folders: dict[str, Path] = {}
    cards: dict[str, Card] = {}
    for phase in phases:
        for name, source in sorted(phase.sources.items()):
            if name not in cards:
                folders[name] = _folder(config.data, phase, source)
                cards[name] = check_dataset(folders[name])
    folders, cards = dict(sorted(folders.items())), dict(sorted(cards.items()))
    _check_tokenizers(folders, cards)
    _check_apart(folders, cards)
    seq_len = config.train.seq_len
    planned = {name: _planned(folders[name], card, config) for name, card in cards.items()}
    plan = make_plan(phases, planned, seq_len, partial(samples_before, config.train))
    return Mixture(phases, plan, folders, cards)


def _folder(config: DataConfig, phase: PhaseSetting, source: SourceSetting) -> Path:
    """Return the folder of a source. Raises ConfigError if it is not a prepared dataset."""
    folder = place_of(config, source)
    if not (folder / CARD).is_file():
        prepared = sorted(card.parent.name for card in folder.parent.glob(f"*/{CARD}"))
        known = f" (prepared there so far: {', '.join(prepared[:8])})" if prepared else ""
        raise ConfigError(
            f"{phase.key}.{source.place}: there is no prepared dataset at {folder}"
            f"{did_you_mean('', source.name, prepared)}{known}; make it with: megatrain prepare "
            + (f"data=demo data.name={config.name}" if config.kind == "demo" else f"data=... data.name={source.name}")
            + f" data.dir={config.dir if config.kind == 'demo' else folder.parent}"
        )
    return folder


def place_of(config: DataConfig, source: SourceSetting) -> Path:
    """Return the folder of a source's dataset, which may not exist."""
    if "/" in source.place:
        return Path(source.place).expanduser()
    corpus = Path(config.dir) / config.name if config.kind == "demo" else Path(config.dir)
    return corpus / source.place


def _check_tokenizers(folders: dict[str, Path], cards: dict[str, Card]) -> None:
    first, *others = cards
    ours = cards[first].tokenizer
    for name in others:
        theirs = cards[name].tokenizer
        if ours == theirs:
            continue
        if ours is None or theirs is None:
            known, unknown = (first, name) if ours else (name, first)
            raise ConfigError(
                f"data.mixture: {folders[unknown]} names no tokenizer and {folders[known]} does; adopt {unknown} again "
                f"with tokenizer.path={folders[known] / 'tokenizer'} if that made its ids"
            )
        differing = next(key for key in vars(ours) if getattr(ours, key) != getattr(theirs, key))
        raise ConfigError(
            f"data.mixture: {first} and {name} were prepared with different tokenizers (their {differing}: "
            f"{getattr(ours, differing)} and {getattr(theirs, differing)}), so equal ids mean different text; prepare "
            f"{name} again with tokenizer={ours.kind} tokenizer.path={folders[first] / 'tokenizer'}"
        )


def _check_apart(folders: dict[str, Path], cards: dict[str, Card]) -> None:
    seen: dict[str, str] = {}
    for name, card in cards.items():
        if other := seen.get(card.fingerprint):
            raise ConfigError(
                f"data.mixture: {folders[other]} and {folders[name]} hold the same data, which would be read in the "
                f"same order twice; name it once, with the larger weight"
            )
        seen[card.fingerprint] = name


def _planned(folder: Path, card: Card, config: TrainConfig) -> PlannedSource:
    seq_len = config.train.seq_len
    if samples := num_samples(folder, card, config.data.packing, seq_len, config.data.verify):
        return PlannedSource(card.fingerprint, samples)
    tokens = card.splits["train"].tokens if "train" in card.splits else 0
    raise DataError(
        f"{folder} holds {tokens} tokens to train on, one sample of train.seq_len={seq_len} needs {seq_len + 1}; "
        "leave it out of data.mixture, use a smaller train.seq_len or prepare more data"
    )


class MixedSamples:
    """The windows of a mixture's sources for `MixtureOrder`, one source after another."""

    def __init__(self, mixture: Mixture, seq_len: int, packing: str, verify: bool) -> None:
        self._mixture, self.seq_len, self._packing, self._verify = mixture, seq_len, packing, verify
        self._names = list(mixture.plan.sources)
        self._first = first_windows(mixture.plan)
        self.num_samples = int(self._first[-1])
        self._opened: dict[str, Windows | PackedSamples] = {}
        self._in_use: list[str] = []  # those whose files are open, the latest last

    def read(self, window: int, vocab_size: int | None) -> Sample:
        """Return what a window of one source holds."""
        at = int(np.searchsorted(self._first, window, side="right")) - 1
        return self._source(self._names[at]).read(window - int(self._first[at]), vocab_size)

    def pause(self) -> None:
        """Close the files of all sources until the next read."""
        while self._in_use:
            self._opened[self._in_use.pop()].pause()

    def sources(self) -> Iterator[tuple[str, Windows | PackedSamples]]:
        """Yield the name of every source and its samples."""
        for name in self._names:
            yield name, self._source(name)

    def _source(self, name: str) -> Windows | PackedSamples:
        """Return a source, and close the files of the one that was used longest ago if too many are open."""
        if name not in self._in_use:
            if name not in self._opened:
                dataset = open_split(self._mixture, name, "train", self._verify)
                self._opened[name] = open_samples(dataset, self._packing, self.seq_len, self._verify)
            if len(self._in_use) >= _MAX_OPEN:
                self._opened[self._in_use.pop(0)].pause()
        else:
            self._in_use.remove(name)
        self._in_use.append(name)
        return self._opened[name]


def open_split(mixture: Mixture, name: str, split: str, verify: bool) -> IndexedDataset:
    """Open a split of one source, whose card has been checked."""
    return IndexedDataset.of_card(mixture.folders[name], split, mixture.cards[name], verify)

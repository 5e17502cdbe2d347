"""Open a run's dataset, check it against the model, and read this rank's share of the held-out data."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megatrain.config import SAMPLING, TrainConfig
from megatrain.data.batch import MicroBatch
from megatrain.data.card import Card, with_vocabulary
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import count_windows, heldout_batches
from megatrain.data.mixed_dataset import MixedSamples, Mixture, open_mixture, open_split
from megatrain.data.mixture import MixtureOrder
from megatrain.data.order import Order, SampleOrder
from megatrain.data.prompts import Prompts, check_prompts
from megatrain.data.samples import BEST_FIT, PackedSamples, Windows, open_samples
from megatrain.errors import ConfigError
from megatrain.optim.schedule import samples_before

_LOG = logging.getLogger("megatrain")


@dataclass(frozen=True)
class RunData:
    """A run's opened data: one dataset, or a mixture of several. In `config` the vocabulary size is filled in.

    `heldout` has the held-out splits by source; a run on one dataset has one, by the name "". `folder` is that of the
    dataset, or of a mixture's first source. A method that samples has `prompts`, and `heldout_prompts` if some are held
    out, but no other held-out data.
    """

    config: TrainConfig
    folder: Path
    card: Card
    train: Windows | PackedSamples | MixedSamples
    heldout: dict[str, IndexedDataset]
    mixture: Mixture | None = None
    prompts: Prompts | None = None
    heldout_prompts: Prompts | None = None

    @property
    def fingerprint(self) -> str:
        """The hash that identifies the dataset, or the mixture and its datasets."""
        return self.card.fingerprint

    @property
    def order(self) -> Order:
        """The order of the training samples."""
        seq_len, seed = self.config.train.seq_len, self.config.seed
        if self.prompts is not None:
            return SampleOrder(self.fingerprint, "prompts", 1, len(self.prompts), seed)
        if self.mixture is not None:
            return MixtureOrder(self.mixture.plan, "train", seq_len, seed)
        return SampleOrder(self.fingerprint, "train", seq_len, self.train.num_samples, seed)

    def continued(self, mixture: Mixture) -> RunData:
        """Return the data of a run that continues a mixture's plan."""
        train = _mixed_samples(self.config, mixture)
        return replace(self, mixture=mixture, card=mixture.card(self.card.name), train=train)

    @property
    def packings(self) -> dict[str, dict[str, int | float]]:
        """The figures of each source's packing, by the name of its dataset; empty without `data.packing=best_fit`."""
        if self.config.data.packing != BEST_FIT:
            return {}
        named = self.train.sources() if isinstance(self.train, MixedSamples) else [(self.card.name, self.train)]
        return {name: samples.index.card.figures for name, samples in named if isinstance(samples, PackedSamples)}

    @property
    def end_of_document(self) -> int | None:
        """The token that ends a document; None if the run does not mask documents."""
        if not self.config.train.mask_documents:
            return None
        assert self.card.tokenizer is not None, "verbs/path_checks.py refuses a dataset without one"
        return self.card.tokenizer.end_of_document


def open_data(config: TrainConfig) -> RunData:
    """Open the dataset of a run and fill in the model's vocabulary size.

    Raises:
        DataError: the dataset is damaged or has too few tokens for one sample.
        ConfigError: the tokenizer has more tokens than the model, evaluation is on but there is no held-out data, or
            documents should be masked but do not end with the tokenizer's end-of-document token.
    """
    if mixture := open_mixture(config, samples_before):
        return _open_mixed(config, mixture)
    folder = Path(config.data.dir) / config.data.name
    dataset = IndexedDataset.open(folder, "train", config.data.verify)
    config = with_vocabulary(config, dataset.card, folder)
    if config.method.name in SAMPLING:
        return _open_prompts(config, folder, dataset)
    train = open_samples(dataset, config.data.packing, config.train.seq_len, config.data.verify)
    heldout = {}
    if _has_heldout(dataset.card):
        heldout[""] = IndexedDataset.open(folder, "heldout", config.data.verify)
    elif config.train.eval_every:
        raise ConfigError(
            f"train.eval_every={config.train.eval_every}, but {folder} has no held-out split; prepare it with "
            f"data.heldout_fraction above 0 or set train.eval_every=0"
        )
    data = RunData(config, folder, dataset.card, train, heldout)
    _check_document_ends(data, [dataset])
    return data


def _open_prompts(config: TrainConfig, folder: Path, dataset: IndexedDataset) -> RunData:
    """Open the dataset of a method that samples. Raises as `open_data`."""
    check_prompts(dataset.card, folder, config.method.name)
    prompts, heldout = Prompts(dataset), None
    splits = {"train": prompts}
    if _has_heldout(dataset.card):
        heldout = splits["heldout"] = Prompts(IndexedDataset.open(folder, "heldout", config.data.verify))
        if lacking := set(prompts.fields) - set(heldout.fields):
            raise ConfigError(
                f"{folder}: held-out prompts lack {', '.join(sorted(lacking))}, which all others have, so rewards "
                "cannot judge replies to them; give all prompts the same fields, or set data.heldout_fraction=0"
            )
    room = config.train.seq_len, config.method.max_new_tokens
    for split, some in splits.items():
        if left_out := some.check(*room, config.model.vocab, skip=config.data.on_bad_record != "stop"):
            _LOG.warning(
                "%d prompts of %s leave no room for a reply in train.seq_len=%d and are left out",
                *(left_out, split, room[0]),
            )
    return RunData(config, folder, dataset.card, Windows(dataset, 1), {}, prompts=prompts, heldout_prompts=heldout)


def _has_heldout(card: Card) -> bool:
    return "heldout" in card.splits and card.splits["heldout"].tokens > 1


def _open_mixed(config: TrainConfig, mixture: Mixture) -> RunData:
    """Open a mixture, whose cards have been read. Raises as `open_data`."""
    card = mixture.card(config.data.name)
    config = with_vocabulary(config, card, mixture.folder)
    first = mixture.plan.phases[0].weights
    names = [name for name, source in mixture.cards.items() if _has_heldout(source)]
    if config.train.eval_every and not any(name in first for name in names):
        raise ConfigError(
            f"train.eval_every={config.train.eval_every}, but no dataset of data.mixture has a held-out split; prepare "
            f"one with data.heldout_fraction above 0 or set train.eval_every=0"
        )
    verify = config.data.verify
    heldout = {}
    for name in names:
        heldout[name] = open_split(mixture, name, "heldout", verify)
        heldout[name].pause()  # a process may have fewer files open than a mixture has sources
    train = _mixed_samples(config, mixture)
    data = RunData(config, mixture.folder, card, train, heldout, mixture)
    _check_document_ends(data, (open_split(mixture, name, "train", verify) for name in mixture.cards))
    return data


def _mixed_samples(config: TrainConfig, mixture: Mixture) -> MixedSamples:
    return MixedSamples(mixture, config.train.seq_len, config.data.packing, config.data.verify)


def _check_document_ends(data: RunData, datasets: Iterable[IndexedDataset]) -> None:
    """Refuse to mask documents if they do not end with the end-of-document token."""
    end = data.end_of_document
    if end is None:
        return
    for dataset in datasets:
        last = next(ids for ids in dataset.documents() if len(ids))[-1]
        if last != end:
            raise ConfigError(
                f"train.mask_documents=true: a document should end with token {end}, as {dataset.folder}'s tokenizer "
                f"says, but its first document ends with {last}; name the tokenizer that made the data when preparing "
                f"it, make the data with end-of-document tokens (Megatron-LM: --append-eod), or set "
                f"train.mask_documents=false"
            )


@dataclass(frozen=True)
class HeldoutShare:
    """The held-out batches of one data-parallel rank, from one source.

    `source` is "" for a run on one dataset. `weight` is the source's in the run's held-out loss.
    """

    source: str
    weight: float
    dataset: IndexedDataset
    config: TrainConfig
    dp_rank: int
    dp_size: int
    end_of_document: int | None

    def batches(self) -> Iterator[MicroBatch]:
        """Yield this rank's batches, starting with the first; then close the files until the next evaluation."""
        loop = self.config.train
        yield from heldout_batches(
            self.dataset,
            seq_len=loop.seq_len,
            micro_batch_size=loop.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            max_samples=self._limit,
            vocab_size=self.config.model.vocab,
            end_of_document=self.end_of_document,
            reset_positions=loop.reset_positions,
        )
        self.dataset.pause()

    @cached_property
    def num_batches(self) -> int:
        """Batches of `train.global_batch_size` sequences that an evaluation reads, on all ranks together."""
        return self._batches_of(count_windows(self.dataset, self.config.train.seq_len, self._limit))

    @cached_property
    def all_batches(self) -> int:
        """Such batches of the whole split."""
        return self._batches_of(count_windows(self.dataset, self.config.train.seq_len))

    def batches_done(self, micro_batches: int) -> int:
        """Return how many such batches are done once each rank has done so many micro-batches."""
        loop = self.config.train
        return min(self.num_batches, micro_batches * loop.micro_batch_size * self.dp_size // loop.global_batch_size)

    def _batches_of(self, windows: int) -> int:
        return -(-windows // self.config.train.global_batch_size)

    @property
    def _limit(self) -> int | None:
        loop = self.config.train
        return loop.eval_steps * loop.global_batch_size if loop.eval_steps else None

    @property
    def bytes_per_token(self) -> float | None:
        """Mean UTF-8 bytes per token; None if the size of the text that counts in the loss is unknown."""
        card = self.dataset.split_card
        return card.bytes_in_loss / card.tokens if card.bytes_in_loss and card.tokens else None

"""What `megatrain evaluate` reads: a prepared dataset, a text file, or the sources of a model's mixture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatrain.checkpoint.find import own_dataset
from megatrain.config import DataConfig, EvaluateConfig
from megatrain.data.card import CARD, Card
from megatrain.data.corpus.normalise import normalise
from megatrain.data.dataset import Dataset
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.mixed_dataset import place_of
from megatrain.data.mixture_settings import read_phases
from megatrain.data.tokenizer import Tokenizer
from megatrain.errors import ConfigError, DataError
from megatrain.interop.load_model import Loaded


@dataclass(frozen=True)
class Source:
    """What to evaluate on.

    `num_tokens` tokens encode a text of `num_bytes` UTF-8 bytes (None if unknown). `end_of_document` is the token that
    ends a document (None if unknown). `weight` is that of a mixture's source in the mean.
    """

    name: str
    tokens: Dataset
    num_bytes: int | None
    num_tokens: int
    end_of_document: int | None
    weight: float = 1.0


class TextTokens:
    """A text's token ids in memory, as a `Dataset`."""

    def __init__(self, path: Path, ids: list[int]) -> None:
        self.name = str(path)
        self.num_tokens = len(ids)
        self._ids = np.array(ids, dtype=np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return token ids `[start, start + count)`."""
        return self._ids[start : start + count].copy()

    def counts(self, start: int, count: int) -> None:
        """Return None: all tokens count."""

    def place(self, token: int) -> str:
        """Return the token's index; ids of a text have no offset in its file."""
        return f"token {token}"

    def pause(self) -> None:
        """Do nothing: there is no file."""


def open_source(config: EvaluateConfig, loaded: Loaded) -> Source:
    """Open the text to evaluate on: `data`, or the dataset of the model's run."""
    if config.data is None:
        return open_dataset(training_dataset(loaded), config.split, loaded)
    path = Path(config.data)
    if path.is_dir():
        return open_dataset(path, config.split, loaded)
    return open_text(path, loaded.need_tokenizer())


def open_dataset(folder: Path, split: str, loaded: Loaded) -> Source:
    """Open a split of a prepared dataset. Raises ConfigError if it was made with another tokenizer."""
    dataset = IndexedDataset.open(folder, split, verify=True)
    theirs, ours = dataset.card.tokenizer, loaded.tokenizer
    if theirs and ours and theirs.fingerprint != ours.fingerprint:
        raise ConfigError(
            f"data={folder} was prepared with another tokenizer than the model's (fingerprints "
            f"{theirs.fingerprint} and {ours.fingerprint}), so its ids mean other text; give the text itself "
            f"(data=<file>) or prepare it with tokenizer.path={loaded.tokenizer_dir}"
        )
    if dataset.num_tokens < 2:
        raise DataError(f"{dataset.name}: {dataset.num_tokens} tokens are too few to predict any; give a larger split")
    end = dataset.card.tokenizer.end_of_document if dataset.card.tokenizer else None
    return Source(f"{folder} ({split})", dataset, dataset.split_card.bytes_in_loss, dataset.num_tokens, end)


def open_text(path: Path, tokenizer: Tokenizer) -> Source:
    """Open a text file as one document that follows BOS (if the model's documents do) or an end of document.

    That token is given; the end of the document is predicted.
    """
    try:
        text = normalise(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}); give a text file or a prepared dataset"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not text:
        raise DataError(f"{path} holds no text; give another file")
    end = tokenizer.end_of_document
    ids = [*(tokenizer.start() or [end]), *tokenizer.encode(text), end]
    return Source(str(path), TextTokens(path, ids), len(text.encode()), len(ids) - 1, end)


def mixed_sources(config: EvaluateConfig, loaded: Loaded) -> dict[str, Source]:
    """Open the sources of the mixture that the model was trained on, those that have the split; empty without one.

    Their weights are those that the mean of training has. Raises ConfigError if a dataset is missing, or none has the
    split; DataError if one changed.
    """
    plan = loaded.manifest.identity.mixture if loaded.manifest else None
    if config.data is not None or plan is None:
        return {}
    opened = {}
    for name, folder in mixture_folders(loaded).items():
        if not (folder / CARD).is_file():
            raise ConfigError(
                f"data: {folder} of the run's mixture does not exist; give data=<prepared dataset or text file>"
            )
        card = Card.load(folder)
        if card.fingerprint != plan.sources[name].fingerprint:
            raise DataError(
                f"{folder} is no longer the dataset that the model was trained on (its fingerprint was "
                f"{plan.sources[name].fingerprint}); give data={folder} to evaluate on it anyway"
            )
        if config.split in card.splits and card.splits[config.split].tokens > 1:
            opened[name] = open_dataset(folder, config.split, loaded)
    weights = plan.first_weights(opened)
    if not weights:
        raise ConfigError(f"split={config.split}: no dataset of the run's mixture has such a split; give another one")
    return {name: replace(source, weight=weights.get(name, 0)) for name, source in sorted(opened.items())}


def mixture_folders(loaded: Loaded) -> dict[str, Path]:
    """Return the datasets of the mixture that a model was trained on, by name; empty without one."""
    if loaded.manifest is None or loaded.manifest.identity.mixture is None:
        return {}
    data = loaded.run_config()["data"]
    known = {name: data[name] for name in ("name", "dir", "kind", "mixture", "mixture_temperature", "phases")}
    phases = read_phases(DataConfig(**known))
    return {name: place_of(DataConfig(**known), found) for phase in phases for name, found in phase.sources.items()}


def training_dataset(loaded: Loaded) -> Path:
    """Return the dataset that the model was trained on.

    Raises ConfigError if there is none, DataError if it changed.
    """
    data = loaded.run_config().get("data")
    if loaded.manifest is None or not data:
        raise ConfigError(f"data: {loaded.folder} does not record a dataset; give data=<prepared dataset or text file>")
    folder = Path(data["dir"]) / str(data["name"])
    if not folder.exists():
        raise ConfigError(f"data: the run's dataset {folder} does not exist; give data=<prepared dataset or text file>")
    if own_dataset(loaded.manifest) is None:
        raise DataError(
            f"{folder} is no longer the dataset that the model was trained on (its fingerprint was "
            f"{loaded.manifest.identity.dataset_fingerprint}); give data={folder} to evaluate on it anyway"
        )
    return folder

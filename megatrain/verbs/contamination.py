"""Which texts of tasks and examples a model was trained on: those that its run's own training data hold too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import ConfigError
from megatrain.evaluation.contamination import LEAST, NGRAM, find_contamination
from megatrain.evaluation.results import TaskResult
from megatrain.interop.load_model import Loaded
from megatrain.verbs.evaluation_sources import mixture_folders, training_dataset


def with_contamination(
    results: Sequence[TaskResult], loaded: Loaded, texts: Mapping[str, Sequence[str]]
) -> list[TaskResult]:
    """Return results with what of their `texts` (by name, in order of documents) the training data hold.

    Each sample says so too, as `in_training_data`. Groups of tasks, which have no texts, stay as they are.

    Raises:
        ConfigError: the model's training data are not there.
        DataError: they are damaged, or no longer those that it was trained on.
    """
    folders = list(mixture_folders(loaded).values()) or [training_dataset(loaded)]
    every = [text for found in texts.values() for text in found]
    found = find_contamination(every, _documents(folders, loaded))
    marked, start = {}, 0
    for name, of_task in texts.items():
        stop = start + len(of_task)
        marked[name] = (found.occurs[start:stop], found.too_short[start:stop])
        start = stop
    further = {"folders": [str(folder) for folder in folders], "training_documents": found.training_documents}
    return [_marked(one, *marked[one.name], further) if one.name in marked else one for one in results]


def _marked(result: TaskResult, occurs: list[bool], too_short: list[bool], further: dict[str, Any]) -> TaskResult:
    """Return a result with a note, figures, and a mark on each sample."""
    shared, short = sum(occurs), sum(too_short)
    note = (
        f"{shared:,} of {len(occurs):,} texts share {NGRAM} words in a row (shorter ones all their words) with the "
        f"training data ({', '.join(further['folders'])}; {further['training_documents']:,} documents)"
    )
    if short:
        note += f"; {short:,} have fewer than {LEAST} words, too few to tell"
    samples = [
        {**sample, "in_training_data": occurs[sample.get("doc_id", number)]}
        for number, sample in enumerate(result.samples)
    ]
    figures = {"contamination": {"shared": shared, "too_short": short, "texts": len(occurs), **further}}
    notes = [*result.detail.get("notes", ()), note]
    return replace(result, samples=samples, detail={**result.detail, **figures, "notes": notes})


def _documents(folders: Sequence[Path], loaded: Loaded) -> Iterator[str]:
    """Yield the documents of datasets as text. Raises ConfigError for one without a tokenizer."""
    for folder in folders:
        dataset = IndexedDataset.open(folder, "train", verify=True)
        tokenizer = _tokenizer_of(folder, loaded)
        for ids in dataset.documents():
            yield tokenizer.decode(ids.tolist())


def _tokenizer_of(folder: Path, loaded: Loaded) -> Tokenizer:
    if (folder / "tokenizer").is_dir():
        return load_tokenizer(folder / "tokenizer")
    if loaded.tokenizer is None:
        raise ConfigError(f"contamination=true: {folder} has no tokenizer, so its documents cannot be read as text")
    return loaded.tokenizer

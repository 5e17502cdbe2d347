"""The text that a tokenizer is trained on: a random sample of a source, or of each source of a mixture, by weight.

A sample depends on the documents, the settings and the seed, not on the number of workers. It is held in memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import xxhash

from megatrain.config import DataConfig, TrainTokenizerConfig
from megatrain.data.card import CARD, Card, check_dataset
from megatrain.data.corpus.cleaned import unpack_frame
from megatrain.data.corpus.cleaning import Cleaned, CleanTask, clean_chunk
from megatrain.data.corpus.pipeline import chunks
from megatrain.data.corpus.recipe import build_recipe
from megatrain.data.corpus.record import Policy
from megatrain.data.corpus.shard import Shard
from megatrain.data.corpus.shared_files import own_folder
from megatrain.data.corpus.source import Source
from megatrain.data.corpus.sources import open_source
from megatrain.data.corpus.worker_pool import Workers
from megatrain.data.mixed_dataset import place_of
from megatrain.data.mixture import PlannedSource
from megatrain.data.mixture_settings import PhaseSetting, SourceSetting, phase_weights, read_phases
from megatrain.data.preparation_summary import num_bad
from megatrain.data.progress_line import Meter
from megatrain.data.survey import sample_documents
from megatrain.data.text_stages import check_bad_fraction
from megatrain.data.tokenizer import META, segments
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import ConfigError, DataError

_BYTES_A_TOKEN = 4
"""Of a dataset whose card does not know its bytes, only to guess how many documents to draw."""


@dataclass
class SampledSource:
    """What a source gave: its identity, the bytes that were asked of it, and the documents and bytes that it gave.

    `counts` are those of the records that were read for it, as in a dataset's card.
    """

    identity: dict[str, Any]
    asked: int
    documents: int = 0
    num_bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)


@dataclass
class TextSample:
    """Texts to train on by source, in a fixed order, and what each source gave."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[str, SampledSource] = field(default_factory=dict)

    def add(self, name: str, given: SampledSource, texts: Iterator[str]) -> None:
        """Take texts of a source, the last one cut, until there are as many bytes as are asked of it."""
        self.sources[name], kept = given, self.texts.setdefault(name, [])
        for text in texts:
            left = given.asked - given.num_bytes
            if left <= 0:
                break
            if len(text.encode()) > left:
                text = "".join(_beginning(text, left))
            kept.append(text)
            given.documents += 1
            given.num_bytes += len(text.encode())

    def __iter__(self) -> Iterator[str]:
        for texts in self.texts.values():
            yield from texts

    def fingerprint(self) -> str:
        """Return the xxh3-128 over the sources' names and the texts, each preceded by its size."""
        state = xxhash.xxh3_128()
        for name, texts in self.texts.items():
            state.update(f"{name}\n{len(texts)}\n".encode())
            for text in texts:
                content = text.encode()
                state.update(len(content).to_bytes(8, "little") + content)
        return state.hexdigest()


def _beginning(text: str, num_bytes: int) -> Iterator[str]:
    """Yield the first segments of a text, until they have at least `num_bytes`."""
    for segment in segments(text):
        yield segment
        num_bytes -= len(segment.encode())
        if num_bytes <= 0:
            return


def draw_sample(config: TrainTokenizerConfig, pool: Workers) -> TextSample:
    """Draw `tokenizer.train_bytes` of text, divided among the sources of a mixture by their weights.

    Raises ConfigError for settings and paths, `DataError` for damaged input or if there is no text.
    """
    places = _places(config)
    sample = TextSample()
    for name, (place, asked) in places.items():
        if isinstance(place, Source):
            given = SampledSource(place.identity, asked)
            sample.add(name, given, _of_source(place, config, given, pool))
        else:
            card = check_dataset(place)
            identity = {"dataset": card.name, "fingerprint": card.fingerprint}
            sample.add(name, SampledSource(identity, asked), _of_dataset(place, card, asked, config.seed))
    for name, given in sample.sources.items():
        if bad := num_bad(given.counts):
            print(f"note: {name}: {bad:,} bad records are left out", file=sys.stderr)
        if given.num_bytes < given.asked and len(places) > 1:
            print(
                f"note: {name} has only {given.num_bytes:,} bytes of text, {given.asked:,} were asked of it",
                file=sys.stderr,
            )
    if not any(given.num_bytes for given in sample.sources.values()):
        raise DataError(f"data={config.data.kind}: there is no text to train a tokenizer on")
    return sample


# ---------------------------------------------------------------------------------------------------- weights


def _places(config: TrainTokenizerConfig) -> dict[str, tuple[Source | Path, int]]:
    """Return each source by name, opened, or the folder of a prepared dataset, with the bytes to ask of it."""
    budget = config.tokenizer.train_bytes
    if config.data.kind == "megatron":
        raise ConfigError(
            "data=megatron: a tokenizer is trained on text; give the text, or prepare the ids as a dataset with the "
            "tokenizer that made them and give data=mixture 'data.mixture={name: 1}'"
        )
    phases = read_phases(config.data)
    if not phases:
        return {config.data.name or config.data.kind: (open_source(config.data), budget)}
    if len(phases) > 1:
        raise ConfigError("data.phases: a tokenizer is trained on one mixture; leave data.phases out")
    mixture = phases[0]
    opened = {name: _open(config.data, mixture, source) for name, source in sorted(mixture.sources.items())}
    weights = _weights(config, mixture, opened)
    total = sum(weights.values())
    return {name: (place, int(budget * weights[name] / total)) for name, place in opened.items()}


def _open(data: DataConfig, mixture: PhaseSetting, source: SourceSetting) -> Source | Path:
    """Return the folder of a prepared dataset, or open the files at a path."""
    folder = place_of(data, source)
    if (folder / CARD).is_file():
        return folder
    if data.kind == "demo":
        raise ConfigError(
            f"{mixture.key}.{source.place}: no dataset at {folder}; first give: megatrain prepare data=demo"
        )
    try:
        return open_source(replace(data, kind="files", paths=[source.place], mixture={}))
    except ConfigError as error:
        raise ConfigError(
            f"{mixture.key}.{source.place}: neither a prepared dataset (no {folder / CARD}) nor files to read ({error})"
        ) from error


def _weights(
    config: TrainTokenizerConfig, mixture: PhaseSetting, opened: dict[str, Source | Path]
) -> dict[str, Fraction]:
    """Return the relative bytes of each source."""
    cards = {name: check_dataset(place) for name, place in opened.items() if isinstance(place, Path)}
    sizes = {name: card.splits["train"].bytes for name, card in cards.items() if "train" in card.splits}
    needs_sizes = mixture.temperature is not None or any(source.epochs for source in mixture.sources.values())
    for name, source in mixture.sources.items():
        if sizes.get(name) is None and (needs_sizes or config.weights_in == "tokens"):
            why = f"weights_in={config.weights_in}" if config.weights_in == "tokens" else "epochs or a temperature"
            raise ConfigError(
                f"{mixture.key}.{source.place}: {why} needs the size of its text, which only a dataset that was "
                "prepared from text knows; give weights, and weights_in=bytes"
            )
    in_tokens = config.weights_in == "tokens"
    planned = {}
    for name in opened:
        card = cards.get(name)
        size = (card.splits["train"].tokens if in_tokens else sizes[name] or 0) if card and name in sizes else 0
        planned[name] = PlannedSource("", size)
    weights = {name: Fraction(weight) for name, weight in phase_weights(mixture, planned).items()}
    if not in_tokens:
        return weights
    return {
        name: weight * Fraction(sizes[name] or 0, max(1, cards[name].splits["train"].tokens))
        for name, weight in weights.items()
    }


# ---------------------------------------------------------------------------------------------------- documents


def _of_source(source: Source, config: TrainTokenizerConfig, given: SampledSource, pool: Workers) -> Iterator[str]:
    """Yield random documents of a source that is read and cleaned, in its order; duplicates are left out.

    The documents with the smallest draws are taken, until they have as many bytes as are asked for. Counts records.
    """
    for note in source.notes():
        print(f"note: {note}", file=sys.stderr)
    data = config.data
    policy = Policy(data.text_column, data.undecodable, data.on_bad_record)
    recipe = build_recipe(config.clean.steps)
    for step in recipe:
        step.share(own_folder())
    lowest = _Lowest(given.asked, config.clean.dedup != "none")
    left, first_bad = data.max_documents, None

    def tasks() -> Iterator[CleanTask]:
        nonlocal left
        for shard in _chosen(source, config):
            before = source.progress.bytes
            for chunk in chunks(source.read(shard)):
                if left is not None:
                    chunk = chunk[:left]
                    left -= len(chunk)
                yield CleanTask(chunk, policy, recipe, config.seed)
                if left == 0:
                    return
            source.progress.bytes = before + shard.num_bytes

    with Meter("reading", None if config.read_bytes else source.total_bytes) as meter:
        for result in pool.map(clean_chunk, tasks()):
            lowest.add(result)
            given.counts.update(result.counts)
            first_bad = first_bad or result.first_bad
            meter.update(source.progress.bytes)
    check_bad_fraction(given.counts, data.max_bad_fraction, first_bad)
    yield from lowest.texts()


def _chosen(source: Source, config: TrainTokenizerConfig) -> list[Shard]:
    """Return the shards to read, in their order: all, or random ones that have `read_bytes` together."""
    shards = list(source.shards())
    if config.read_bytes is None:
        return shards
    draws = [xxhash.xxh3_64_intdigest(f"shard {number}".encode(), seed=config.seed) for number in range(len(shards))]
    chosen: list[int] = []
    size = 0
    for number in sorted(range(len(shards)), key=draws.__getitem__):
        if size >= config.read_bytes:
            break
        chosen.append(number)
        size += shards[number].num_bytes
    return [shards[number] for number in sorted(chosen)]


class _Lowest:
    """The documents with the smallest draws, as many as hold a number of bytes; up to twice as many in memory."""

    def __init__(self, num_bytes: int, distinct: bool) -> None:
        self._limit, self._distinct = num_bytes, distinct
        self._kept: list[tuple[int, int, bytes]] = []  # draw, number in the order of the source, text
        self._size = 0
        self._bound = 2**64
        self._count = 0

    def add(self, result: Cleaned) -> None:
        """Take the documents of a chunk."""
        draws = result.documents["sample_draw"].tolist()
        first, self._count = self._count, self._count + len(draws)
        if not any(draw <= self._bound for draw in draws):
            return
        for number, (draw, text) in enumerate(zip(draws, unpack_frame(result.frame, len(draws)), strict=True), first):
            if draw <= self._bound:
                self._kept.append((draw, number, text))
                self._size += len(text)
        if self._size > 2 * self._limit:
            self._prune()

    def _prune(self) -> None:
        kept: list[tuple[int, int, bytes]] = []
        size = 0
        for entry in sorted(self._kept):
            if self._distinct and kept and kept[-1][0] == entry[0] and kept[-1][2] == entry[2]:
                continue  # equal texts have equal draws
            if size >= self._limit:
                break
            kept.append(entry)
            size += len(entry[2])
        if size >= self._limit:
            self._bound = kept[-1][0]
        self._kept, self._size = kept, size

    def texts(self) -> Iterator[str]:
        """Yield the documents in the order of the source."""
        self._prune()
        for _, _, text in sorted(self._kept, key=lambda entry: entry[1]):
            yield text.decode()


def _of_dataset(folder: Path, card: Card, asked: int, seed: int) -> Iterator[str]:
    """Yield random training documents of a prepared dataset, decoded, in its order."""
    if not (folder / "tokenizer" / META).is_file() or "train" not in card.splits:
        raise ConfigError(f"{folder}: has no tokenizer to decode its ids with; give the text that it was made of")
    if card.config.get("data", {}).get("fim_rate"):
        raise ConfigError(
            f"{folder}: was prepared with data.fim_rate, so its documents are rearranged and have control tokens; give "
            "the text that it was made of"
        )
    if card.splits["train"].loss_hashes:
        raise ConfigError(
            f"{folder}: has conversations, laid out by the chat template of a tokenizer; give text that has no markup"
        )
    tokenizer = load_tokenizer(folder / "tokenizer")
    split = card.splits["train"]
    num_bytes = split.bytes if split.bytes is not None else split.tokens * _BYTES_A_TOKEN
    mean = max(1.0, num_bytes / max(1, split.documents))
    count = min(split.documents, 1 + int(asked / mean))
    train = replace(card, splits={"train": split})
    while True:
        drawn = sample_documents(folder, train, count, seed, split.tokens)
        texts = [text for document in drawn if (text := tokenizer.decode(document.ids))]
        missing = asked - sum(len(text.encode()) for text in texts)
        if missing <= 0 or count == split.documents:
            break
        count = min(split.documents, count + 1 + int(missing / mean))
    yield from texts


def described(sample: TextSample) -> dict[str, Any]:
    """Return the sample's fingerprint and sources, for a card."""
    return {
        "fingerprint": sample.fingerprint(),
        "documents": sum(given.documents for given in sample.sources.values()),
        "bytes": sum(given.num_bytes for given in sample.sources.values()),
        "sources": {
            name: asdict(given) | {"counts": {what: count for what, count in sorted(given.counts.items()) if count}}
            for name, given in sample.sources.items()
        },
    }

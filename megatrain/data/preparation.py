"""`megatrain prepare`: read, clean, deduplicate, split, train or load a tokenizer, encode, write.

The stages are in corpus/, each in bounded memory for any corpus size. All of this happens in a hidden folder beside the
target, which one rename turns into the dataset, so an incomplete dataset never has the dataset's name.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.config.flatten import flatten
from megatrain.data.adopt import check_contents_apart, check_prefixes, link, make_card
from megatrain.data.card import CARD, SPLITS, Card, TokenizerCard, card_of_written, check_dataset, fingerprint
from megatrain.data.corpus import pipeline
from megatrain.data.corpus.cleaned import CleanedShard
from megatrain.data.corpus.cleaning import KIND, LEFT_OUT
from megatrain.data.corpus.near_duplicates import NearDuplicates, drop_near_duplicates
from megatrain.data.corpus.recipe import StepReport, build_recipe, settings_of
from megatrain.data.corpus.selection import DROPPED, Selection
from megatrain.data.corpus.source import Source
from megatrain.data.corpus.sources import open_source
from megatrain.data.corpus.worker_pool import Workers
from megatrain.data.indexed import token_dtype
from megatrain.data.staging import StagingFolder
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import find_tokenizer, load_tokenizer
from megatrain.data.tokenizer_training import check_training, train_tokenizer
from megatrain.distributed.rank_environment import usable_cores
from megatrain.errors import ConfigError, DataError, MegatrainError
from megatrain.resilience.atomic_file import write_atomically

QUARANTINE = "quarantine.jsonl"
"""The bad records of a dataset, in its folder, if `data.on_bad_record=quarantine` found any."""
EXAMPLES = "examples.jsonl"
"""Documents that the cleaning steps removed or changed, in the dataset's folder, if there were any."""
_BAD = "bad_"
"""The start of the names of counts of bad records by reason; `bad` counts them all."""
_MANY_BAD = 0.01
"""The share of bad records above which the end of `prepare` warns."""
_NOT_IDENTITY = ("dir", "workers", "overwrite", "verify", "mixture", "mixture_temperature", "phases", "deduplicate")
"""The last: see `_dedup`."""


def prepare(config: PrepareConfig) -> Path:
    """Prepare the dataset that the config describes and return its folder.

    A finished dataset with the same settings is kept. Raises `ConfigError` (settings, paths, another dataset of that
    name), `DataError` (the text itself) or `EnvironmentFault` (a missing library, an unreachable hub).
    """
    opened = check_prefixes(config.data.paths) if config.data.kind == "megatron" else open_source(config.data)
    given = given_tokenizer(config)  # may ask a hub, so mistakes in paths are found first
    if is_prepared(config, _identity(opened), given):
        return Path(config.data.dir) / config.data.name
    return prepare_from(config, opened, given)


def is_prepared(config: PrepareConfig, identity: dict[str, Any], given: Tokenizer | None) -> bool:
    """Return whether the dataset is there already, and say so. Raises `ConfigError` if its name is another one's."""
    target = Path(config.data.dir) / config.data.name
    if not _already_prepared(target, _settings(config) | {"source": identity}, given, config.data.overwrite):
        return False
    print(f"{target}: already prepared with these settings (data.overwrite=true prepares it again)", file=sys.stderr)
    return True


def prepare_from(config: PrepareConfig, opened: Source | dict[str, list[Path]], given: Tokenizer | None) -> Path:
    """Prepare a dataset from an opened source, or from the prefixes of each split; return its folder.

    `given` is the tokenizer to use (None: train one).
    """
    target = Path(config.data.dir) / config.data.name
    if isinstance(opened, Source):
        for note in opened.notes():
            print(f"note: {note}", file=sys.stderr)
    with StagingFolder(target) as staging, _kept_work_is_named(staging):
        first_bad = None
        if isinstance(opened, Source):
            card, first_bad = _prepare_text(opened, config, given, staging)
        else:
            link(opened, staging.folder)
            card = make_card(staging.folder, config.data.name, given)
            check_contents_apart(card, opened)
            if given:
                given.save(staging.folder / "tokenizer")
        card.source, card.config = _identity(opened), _settings(config)
        card.save(staging.folder)
        staging.publish()
    print("\n".join([*_summary(target, card), *_bad_records(target, card.counts, first_bad)]), file=sys.stderr)
    return target


def _identity(opened: Source | dict[str, list[Path]]) -> dict[str, Any]:
    """Return what a source is, or each split's prefix as text (a list of several)."""
    if isinstance(opened, Source):
        return opened.identity
    return {split: str(found[0]) if len(found) == 1 else list(map(str, found)) for split, found in opened.items()}


@contextmanager
def _kept_work_is_named(staging: StagingFolder) -> Iterator[None]:
    """Say what an error or Ctrl-C leaves to go on from."""
    try:
        yield
    except BaseException:
        if staging.has_work():
            print(
                f"what is finished is kept in {staging.work}; the same command goes on from there, and does again only "
                "what a changed file or setting concerns",
                file=sys.stderr,
            )
        raise


def given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    """Load the tokenizer at `tokenizer.path`; None if one is to be trained. Raises `ConfigError`, `DataError`."""
    if config.data.bos and config.data.kind == "megatron":
        raise ConfigError("data.bos=true: the ids of data=megatron stay as they are; tokenize the text again for BOS")
    if config.tokenizer.path:
        tokenizer = find_tokenizer(config.tokenizer.kind, config.tokenizer.path)
        if config.data.kind != "megatron":
            _choose_start(tokenizer, config)
        return tokenizer
    if config.data.kind != "megatron":
        check_training(config.tokenizer)
    return None


def _choose_start(tokenizer: Tokenizer, config: PrepareConfig) -> None:
    """Let documents begin with BOS if `data.bos` says so. Raises `ConfigError` if the tokenizer has no BOS for it."""
    place, bos = config.tokenizer.path, tokenizer.beginning_of_document
    if config.data.bos and bos is None:
        raise ConfigError(
            f"data.bos=true: the tokenizer {place} has no BOS token; name one of its tokens as bos_token in its "
            "tokenizer_config.json, or set data.bos=false"
        )
    if config.data.bos and bos == tokenizer.end_of_document:
        raise ConfigError(
            f"data.bos=true: BOS of the tokenizer {place} is its end-of-document token (id {bos}), which is between "
            "documents already; set data.bos=false"
        )
    if tokenizer.starts_with_bos and not config.data.bos:
        print(f"note: {place} puts BOS before a text, but documents get none; data.bos=true adds it", file=sys.stderr)
    tokenizer.starts_with_bos = config.data.bos


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """Return the settings that determine the dataset's content, as recorded in the card."""
    data = {key: value for key, value in asdict(config.data).items() if key not in _NOT_IDENTITY}
    clean: dict[str, Any] = {"steps": settings_of(build_recipe(config.clean.steps)), "dedup": _dedup(config)}
    if clean["dedup"] == "minhash":
        clean["minhash"] = asdict(config.clean.minhash)
    return {"seed": config.seed, "data": data, "clean": clean, "tokenizer": asdict(config.tokenizer)}


def _dedup(config: PrepareConfig) -> str:
    """Return `clean.dedup`, or what the older `data.deduplicate` says of it. Raises `ConfigError` if they differ."""
    if config.data.deduplicate or config.clean.dedup == "none":
        return config.clean.dedup
    if config.clean.dedup == "exact":  # the default
        return "none"
    raise ConfigError(
        f"data.deduplicate=false and clean.dedup={config.clean.dedup} contradict each other; leave data.deduplicate out"
    )


def _older(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that an older card's settings imply: keys that it lacks, and one under an older name."""
    data = {key: value for key, value in asdict(DataConfig()).items() if key not in _NOT_IDENTITY}
    exact = recorded.get("data", {}).get("deduplicate", True)
    clean: dict[str, Any] = {"steps": [], "dedup": "exact" if exact else "none"}
    return {"data": data, "clean": clean, "tokenizer": asdict(TokenizerConfig())}


def _already_prepared(target: Path, settings: dict[str, Any], given: Tokenizer | None, overwrite: bool) -> bool:
    """Return whether `target` is this dataset already (False to overwrite it). Raise `ConfigError` if it is another."""
    if not target.exists():
        return False
    if not (target / CARD).is_file():
        if target.is_dir() and not any(target.iterdir()):
            return False
        raise ConfigError(f"data.name: {target} exists and is not a prepared dataset; choose another data.name")
    if overwrite:
        return False
    card = check_dataset(target)
    was = flatten(_older(card.config)) | flatten(card.config | {"source": card.source})
    was.pop("data.deduplicate", None)
    now = flatten(settings)
    changed = [
        f"{key} (was {was.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(was | now)
        if was.get(key) != now.get(key)
    ]
    if given and card.tokenizer:
        if given.fingerprint != card.tokenizer.fingerprint:
            changed.append("the tokenizer at tokenizer.path")
        elif given.end_of_document != card.tokenizer.end_of_document:
            was_end, now_end = card.tokenizer.end_of_document, given.end_of_document
            changed.append(f"the end-of-document token of tokenizer.path (was id {was_end}, now {now_end})")
    if changed:
        raise ConfigError(
            f"data.name: {target} was prepared with other settings: {'; '.join(changed)}. "
            "Choose another data.name, or data.overwrite=true to replace it"
        )
    return True


# ---------------------------------------------------------------------------------------------------- text


def _prepare_text(
    source: Source, config: PrepareConfig, given: Tokenizer | None, staging: StagingFolder
) -> tuple[Card, str | None]:
    """Read, clean, tokenize and write everything in the staging folder except the card.

    Returns the card, and where the first bad record is and why it is bad (None if there is none).
    """
    folder, work = staging.folder, staging.work
    with Workers(config.data.workers or usable_cores()) as pool:
        shards = pipeline.clean_source(source, config, pool, work / "cleaned")
        counts = pipeline.total_counts(shards)
        if counts["markup"]:
            print(
                f"note: {counts['markup']:,} documents are HTML, and their tags stay in the text; clean=web extracts "
                "their text, as does the step html in a recipe of your own (clean.steps)",
                file=sys.stderr,
            )
        first_bad = next((shard.first_bad for shard in shards if shard.first_bad), None)
        _check_bad_fraction(counts, config.data.max_bad_fraction, first_bad)
        selection = Selection(shards, work / "flags")
        near = _drop_duplicates(selection, config, counts, work)
        selection = _split(selection, config, counts, first_bad, work)
        _join_quarantine(shards, folder / QUARANTINE)
        reports = pipeline.total_reports(shards)
        _write_examples(reports, near, folder / EXAMPLES)
        tokenizer = given or _train_tokenizer(config, selection, work)
        tokenizer.save(folder / "tokenizer")
        dtype = token_dtype(tokenizer.vocab_size)
        encoded = pipeline.encode_selection(selection, tokenizer, folder / "tokenizer", dtype, pool, work / "encoded")
    splits = {}
    for number, name in enumerate(SPLITS, start=1):
        if joined := pipeline.join(encoded, number, folder / name, dtype):
            splits[name] = card_of_written(*joined)
    card = Card(
        name=config.data.name,
        fingerprint=fingerprint(splits),
        splits=splits,
        tokenizer=TokenizerCard.of(tokenizer),
        counts=dict(sorted(counts.items())),
        cleaning=[report.without_examples() for report in reports],
        near_duplicates=near.without_examples() if near else {},
    )
    return card, first_bad


def _drop_duplicates(
    selection: Selection, config: PrepareConfig, counts: Counter[str], work: Path
) -> NearDuplicates | None:
    """Drop and count duplicates. Return what was found of near duplicates, None if they are not looked for."""
    dedup, memory = _dedup(config), config.clean.dedup_memory_mb * 2**20
    if dedup != "none" and (dropped := selection.drop_duplicates(memory)):
        counts["duplicates"] = dropped
    signing = pipeline.signing_of(config)
    if not signing:
        return None
    found = drop_near_duplicates(selection, config.clean.minhash, signing, memory, work / "bands")
    if found.documents:
        counts["near_duplicates"] = found.documents
    return found


def _split(
    selection: Selection, config: PrepareConfig, counts: Counter[str], first_bad: str | None, work: Path
) -> Selection:
    """Decide what is held out, and count it. Raises `DataError` if nothing is left to train on."""
    kept = selection.num_documents - selection.count(DROPPED)
    if not kept:
        first = f"; the first bad record: {first_bad}" if first_bad else ""
        raise DataError(f"data={config.data.kind}: the corpus is empty ({_format_counts(counts)}){first}")
    if kept == 1 and config.data.heldout_fraction > 0:
        counts["cut_in_two"] = 1
        return pipeline.cut_in_two(selection.shards, selection, config.data.heldout_fraction, work / "flags_of_halves")
    selection.hold_out(config.data.heldout_fraction)
    return selection


def _num_bad(counts: Mapping[str, int]) -> int:
    return counts.get("bad", 0) + counts.get("skipped_undecodable", 0)


def _check_bad_fraction(counts: Counter[str], limit: float, first_bad: str | None) -> None:
    """Raise `DataError` if more than `data.max_bad_fraction` of the records were left out as bad."""
    bad = _num_bad(counts)
    if bad > limit * counts["read"]:
        raise DataError(
            f"data.max_bad_fraction={limit:g}: {bad} of {counts['read']} records are bad ({_format_counts(counts)}); "
            f"the first: {first_bad}; mend the data, or allow a larger fraction"
        )


def _join_quarantine(shards: list[CleanedShard], path: Path) -> None:
    """Write the bad records of all shards into one file, if there are any."""
    for shard in shards:
        if shard.quarantine_path.exists():
            with open(path, "ab") as file, open(shard.quarantine_path, "rb") as part:
                shutil.copyfileobj(part, file)


def _write_examples(reports: list[StepReport], near: NearDuplicates | None, path: Path) -> None:
    """Write the steps' examples and those of near duplicates, one a line, if there are any."""
    lines = [json.dumps({"step": report.name} | example) for report in reports for example in report.examples]
    lines += [json.dumps({"step": "near_duplicates"} | example) for example in near.examples] if near else []
    if lines:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _train_tokenizer(config: PrepareConfig, selection: Selection, work: Path) -> Tokenizer:
    """Train a tokenizer on a sample of the corpus, or take the one that an interrupted preparation trained on it."""
    keys = [shard.key for shard in selection.shards]
    key = json.dumps([keys, _settings(config)], sort_keys=True)
    saved, saved_key = work / "tokenizer", work / "tokenizer.json"
    if saved_key.is_file() and saved_key.read_text(encoding="utf-8") == key:
        with suppress(MegatrainError):  # damaged, as after a power cut: train it again
            return load_tokenizer(saved)
    start = time.monotonic()
    texts = pipeline.sample_texts(selection, config.tokenizer.train_bytes)
    tokenizer = train_tokenizer(texts, config.tokenizer, config.data.bos)
    tokenizer.starts_with_bos = config.data.bos
    asked = config.tokenizer.vocab_size
    fewer = "" if tokenizer.vocab_size == asked else f" (fewer than the {asked} asked for: the text has no more)"
    print(
        f"tokenizer: trained {tokenizer.vocab_size} pieces{fewer} in {time.monotonic() - start:.1f} s", file=sys.stderr
    )
    tokenizer.save(saved)
    write_atomically(saved_key, key)
    return tokenizer


def _format_counts(counts: Mapping[str, int]) -> str:
    return (
        ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(counts.items()) if count)
        or "nothing read"
    )


def _summary(target: Path, card: Card) -> Iterator[str]:
    """Yield the lines that say what was prepared."""
    yield f"{target}: prepared, fingerprint {card.fingerprint}"
    for name, split in card.splits.items():
        size = f"  {name}: {split.documents:,} document{'s' * (split.documents != 1)}, {split.tokens:,} tokens"
        if split.bytes is not None:  # unknown for data that came as token ids
            size += f", {split.bytes / 1e6:.1f} MB of text ({split.bytes / max(split.tokens, 1):.2f} bytes a token)"
        yield size
    kinds = {name.removeprefix(KIND): count for name, count in card.counts.items() if name.startswith(KIND)}
    if kinds:
        yield f"  read as: {_format_counts(kinds)}"
    if left_out := card.counts.get(LEFT_OUT):
        reasons = {
            n.removeprefix(f"{LEFT_OUT}_"): count for n, count in card.counts.items() if n.startswith(f"{LEFT_OUT}_")
        }
        yield f"  no documents, left out: {left_out:,} ({_format_counts(reasons)})"
    counts = {name: count for name, count in card.counts.items() if not name.startswith((_BAD, KIND, LEFT_OUT))}
    if card.counts:
        yield f"  documents: {_format_counts(counts)}"
    for step in card.cleaning:
        removed = step["documents_in"] - step["documents_out"]
        what = [f"{removed:,} removed ({_format_counts(step['rules'])})"] if removed else []
        changes = f" ({_format_counts(step['changes'])})" if step["changes"] else ""
        what += [f"{step['changed']:,} changed{changes}"] if step["changed"] else []
        yield f"  {step['name']}: {step['documents_in']:,} documents, {', '.join(what) or 'nothing to do'}"
    if near := card.near_duplicates:
        yield (
            f"  near duplicates: {near['documents']:,} dropped, in {near['clusters']:,} clusters of up to "
            f"{near['largest']:,}; {near['compared']:,} comparisons, {near['rejected']:,} rejected; "
            f"{near['below']:,} of {near['checked']:,} pairs checked by their text are below the threshold"
        )


def _bad_records(target: Path, counts: Mapping[str, int], first: str | None) -> Iterator[str]:
    """Yield the lines that say how many records were left out as bad, by reason, where they are, and the first."""
    bad, read = _num_bad(counts), counts.get("read", 0)
    if not bad:
        return
    kinds = {name.removeprefix(_BAD): count for name, count in counts.items() if name.startswith(_BAD)}
    kinds["undecodable"] = counts.get("skipped_undecodable", 0)
    kept = target / QUARANTINE
    where = f"kept in {kept}" if kept.is_file() else "not kept; data.on_bad_record=quarantine keeps them"
    yield f"  bad records left out: {bad:,} of {read:,} ({_format_counts(kinds)}), {where}"
    yield f"  the first: {first}"
    if bad > _MANY_BAD * read:
        yield (
            f"warning: {100 * bad / read:.3g}% of the records are bad and were left out; mend the data, or refuse so "
            f"many with data.max_bad_fraction={_MANY_BAD:g}"
        )

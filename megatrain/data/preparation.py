"""`megatrain prepare`: read, clean, deduplicate, split, train or load a tokenizer, encode, write.

Three stages, each in bounded memory for any corpus size. First, workers clean the source into a compressed spool on
disk; duplicates are dropped and documents held out as it is written. Then the tokenizer is trained on a sample of the
spool. Last, workers encode the spool, and the results are written in order. All of this happens in a hidden folder
beside the target, which one rename turns into the dataset, so an incomplete dataset never has the dataset's name.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatrain.config import DataConfig, PrepareConfig
from megatrain.config.flatten import flatten
from megatrain.data.adopt import check_contents_apart, check_prefixes, link, make_card
from megatrain.data.card import CARD, SPLITS, Card, TokenizerCard, card_of_written, check_dataset, fingerprint
from megatrain.data.indexed import IndexedWriter, token_dtype
from megatrain.data.normalise import Policy, Record
from megatrain.data.progress_line import Meter
from megatrain.data.sources import Source, open_source
from megatrain.data.spool import DROPPED, HELDOUT, TRAIN, Sample, Seen, Spool, pack, unpack
from megatrain.data.staging import StagingFolder
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import find_tokenizer
from megatrain.data.tokenizer_sentencepiece import train_sentencepiece
from megatrain.data.workers import Cleaned, CleanTask, EncodeTask, Workers, clean_chunk, encode_chunk
from megatrain.distributed.rank_environment import usable_cores
from megatrain.errors import ConfigError, DataError

CHUNK_BYTES = 2**20
CHUNK_RECORDS = 2048
QUARANTINE = "quarantine.jsonl"
"""The bad records of a dataset, in its folder, if `data.on_bad_record=quarantine` found any."""
_BAD = "bad_"
"""The start of the names of counts of bad records by reason; `bad` counts them all."""
_MANY_BAD = 0.01
"""The share of bad records above which the end of `prepare` warns."""
_NOT_IDENTITY = ("dir", "workers", "overwrite", "verify")


def prepare(config: PrepareConfig) -> Path:
    """Prepare the dataset that the config describes and return its folder.

    A finished dataset with the same settings is kept. Raises `ConfigError` (settings, paths, another dataset of that
    name), `DataError` (the text itself) or `EnvironmentFault` (a missing library, an unreachable hub).
    """
    target = Path(config.data.dir) / config.data.name
    opened = check_prefixes(config.data.paths) if config.data.kind == "megatron" else open_source(config.data)
    given = _given_tokenizer(config)  # may ask a hub, so mistakes in paths are found first
    identity = opened.identity if isinstance(opened, Source) else _names(opened)
    settings = _settings(config)
    if _already_prepared(target, settings | {"source": identity}, given, config.data.overwrite):
        print(
            f"{target}: already prepared with these settings (data.overwrite=true prepares it again)", file=sys.stderr
        )
        return target
    with StagingFolder(target) as staging:
        first_bad = None
        if isinstance(opened, Source):
            card, first_bad = _prepare_text(opened, config, given, staging.folder)
        else:
            link(opened, staging.folder)
            card = make_card(staging.folder, config.data.name, given)
            check_contents_apart(card, opened)
            if given:
                given.save(staging.folder / "tokenizer")
        card.source, card.config = identity, settings
        card.save(staging.folder)
        staging.publish()
    print("\n".join([*_summary(target, card), *_bad_records(target, card.counts, first_bad)]), file=sys.stderr)
    return target


def _names(prefixes: dict[str, list[Path]]) -> dict[str, Any]:
    """Return each split's prefix as text, or a list of several."""
    return {split: str(found[0]) if len(found) == 1 else list(map(str, found)) for split, found in prefixes.items()}


def _prepare_text(
    source: Source, config: PrepareConfig, given: Tokenizer | None, folder: Path
) -> tuple[Card, str | None]:
    """Read, clean, tokenize and write everything in `folder` except the card.

    Returns the card, and where the first bad record is and why it is bad (None if there is none).
    """
    with Workers(config.data.workers or usable_cores()) as pool, Spool(folder) as spool:
        cleaned = _clean(source, config, pool, spool, folder)
        tokenizer = given or _train_tokenizer(config, spool, cleaned)
        tokenizer.save(folder / "tokenizer")
        splits = _encode(spool, folder, tokenizer, pool)
    card = Card(
        name=config.data.name,
        fingerprint=fingerprint(splits),
        splits=splits,
        tokenizer=TokenizerCard.of(tokenizer),
        counts=dict(sorted(cleaned.counts.items())),
    )
    return card, cleaned.first_bad


def _given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    if config.data.bos and config.data.kind == "megatron":
        raise ConfigError("data.bos=true: the ids of data=megatron stay as they are; tokenize the text again for BOS")
    if config.tokenizer.path:
        tokenizer = find_tokenizer(config.tokenizer.kind, config.tokenizer.path)
        if config.data.kind != "megatron":
            _choose_start(tokenizer, config)
        return tokenizer
    if config.tokenizer.kind != "sentencepiece" and config.data.kind != "megatron":
        raise ConfigError(
            f"tokenizer.path: missing; tokenizer.kind={config.tokenizer.kind} is loaded from a path, "
            "only sentencepiece can be trained here"
        )
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
    return {"seed": config.seed, "data": data, "tokenizer": asdict(config.tokenizer)}


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
    newer = {"data": {key: value for key, value in asdict(DataConfig()).items() if key not in _NOT_IDENTITY}}
    was = flatten(newer) | flatten(card.config | {"source": card.source})  # older cards lack newer keys
    now = flatten(settings)
    changed = [
        f"{key} (was {was.get(key)!r}, now {now.get(key)!r})"
        for key in sorted(was | now)
        if was.get(key) != now.get(key)
    ]
    if given and card.tokenizer and given.fingerprint != card.tokenizer.fingerprint:
        changed.append("the tokenizer at tokenizer.path")
    if changed:
        raise ConfigError(
            f"data.name: {target} was prepared with other settings: {'; '.join(changed)}. "
            "Choose another data.name, or data.overwrite=true to replace it"
        )
    return True


# ---------------------------------------------------------------------------------------------------- cleaning


@dataclass
class CleaningResult:
    """Counts, the number of documents in each split, and the documents to train the tokenizer on."""

    sample: Sample
    counts: Counter[str] = field(default_factory=Counter)
    kept: Counter[int] = field(default_factory=Counter)
    lowest: tuple[int, int] | None = None  # (random draw, document) of the document to hold out first
    highest: tuple[int, int] | None = None  # the same for the one to hold out last
    first_bad: str | None = None  # where the first bad record is, and why it is bad


def _clean(source: Source, config: PrepareConfig, pool: Workers, spool: Spool, folder: Path) -> CleaningResult:
    """Fill the spool. Raises `DataError` if nothing is left to train on."""
    policy = Policy(config.data.text_column, config.data.undecodable, config.data.on_bad_record)
    result = CleaningResult(Sample(config.tokenizer.train_bytes))
    seen = Seen(folder / "seen.sqlite") if config.data.deduplicate else None
    tasks = (CleanTask(chunk, policy) for chunk in _chunks(source, config.data.max_documents))
    with Meter("reading", source.total_bytes) as meter:
        for cleaned in pool.map(clean_chunk, tasks):
            _store_chunk(cleaned, spool, result, seen, config)
            result.first_bad = result.first_bad or cleaned.first_bad
            if cleaned.quarantine:
                with open(folder / QUARANTINE, "ab") as file:
                    file.write(cleaned.quarantine)
            meter.update(source.progress.bytes)
    if seen:
        seen.close()
    result.counts["oversized"] = source.progress.oversized
    _check_bad_fraction(result.counts, config.data.max_bad_fraction, result.first_bad)
    if not sum(result.kept.values()):
        first = f"; the first bad record: {result.first_bad}" if result.first_bad else ""
        raise DataError(f"data={config.data.kind}: the corpus is empty ({_format_counts(result.counts)}){first}")
    if config.data.heldout_fraction > 0:
        _fill_both_splits(spool, result, config.data.heldout_fraction)
    return result


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


def _chunks(source: Source, max_documents: int | None) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in itertools.islice(source.records(), max_documents):
        chunk.append(record)
        size += len(record.payload)
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _store_chunk(
    cleaned: Cleaned, spool: Spool, result: CleaningResult, seen: Seen | None, config: PrepareConfig
) -> None:
    """Assign each document of a chunk to a split or drop it, and write the chunk to the spool."""
    result.counts.update(cleaned.counts)
    held_below = int(config.data.heldout_fraction * 2**64)
    flags = bytearray(len(cleaned.sizes))
    draws: list[int] = []
    for i in range(len(flags)):
        digest = cleaned.hashes[16 * i : 16 * i + 16]
        draws.append(xxhash.xxh3_64_intdigest(b"sample" + digest, seed=config.seed))
        if seen is not None and not seen.add(digest):
            result.counts["duplicates"] += 1
            continue
        held = xxhash.xxh3_64_intdigest(b"heldout" + digest, seed=config.seed)
        flags[i] = HELDOUT if held < held_below else TRAIN
        result.kept[flags[i]] += 1
        drawn = (held, spool.documents + i)
        result.lowest = min(result.lowest or drawn, drawn)
        result.highest = max(result.highest or drawn, drawn)
    frame = spool.add(cleaned.frame, bytes(flags), sum(cleaned.sizes))
    for i, flag in enumerate(flags):
        if flag == TRAIN:
            result.sample.offer(draws[i], cleaned.sizes[i], frame, i)


def _fill_both_splits(spool: Spool, result: CleaningResult, fraction: float) -> None:
    """Give each split of a small corpus at least one document; cut a single document in two."""
    assert result.lowest and result.highest
    if sum(result.kept.values()) == 1:
        _cut_in_two(spool, result, fraction)
    elif not result.kept[HELDOUT]:
        spool.set_flag(result.lowest[1], HELDOUT)
        result.sample.forget(*spool.locate(result.lowest[1]))
    elif not result.kept[TRAIN]:
        spool.set_flag(result.highest[1], TRAIN)
        frame, index = spool.locate(result.highest[1])
        result.sample.offer(0, len(unpack(spool.path, frame)[index]), frame, index)


def _cut_in_two(spool: Spool, result: CleaningResult, fraction: float) -> None:
    """Hold out the end of the only document, cut at the start of a line if possible."""
    assert result.lowest
    frame, index = spool.locate(result.lowest[1])
    text = unpack(spool.path, frame)[index].decode()
    if len(text) < 2:
        raise DataError("the corpus is a single character, too short to be split; set data.heldout_fraction=0")
    middle = min(max(1, int(len(text) * (1 - fraction))), len(text) - 1)
    at = text.rfind("\n", 0, middle) + 1 or middle
    spool.set_flag(result.lowest[1], DROPPED)
    parts = [text[:at].encode(), text[at:].encode()]
    frame = spool.add(pack(parts), bytes([TRAIN, HELDOUT]), sum(map(len, parts)))
    result.counts["cut_in_two"] = 1
    result.sample = Sample(result.sample.budget)
    result.sample.offer(0, len(parts[0]), frame, 0)


# ---------------------------------------------------------------------------------------------------- encoding


def _train_tokenizer(config: PrepareConfig, spool: Spool, cleaned: CleaningResult) -> Tokenizer:
    start = time.monotonic()
    tokenizer = train_sentencepiece(cleaned.sample.texts(spool), config.tokenizer.vocab_size, config.data.bos)
    tokenizer.starts_with_bos = config.data.bos
    asked = config.tokenizer.vocab_size
    fewer = "" if tokenizer.vocab_size == asked else f" (fewer than the {asked} asked for: the text has no more)"
    print(
        f"tokenizer: trained {tokenizer.vocab_size} pieces{fewer} in {time.monotonic() - start:.1f} s", file=sys.stderr
    )
    return tokenizer


def _encode(spool: Spool, folder: Path, tokenizer: Tokenizer, pool: Workers) -> dict[str, Any]:
    """Write each split's `.bin/.idx` in corpus order and return the cards; splits without documents are skipped."""
    dtype = token_dtype(tokenizer.vocab_size)
    encoding = (folder / "tokenizer", tokenizer.fingerprint, tokenizer.starts_with_bos, dtype.name)
    tasks = (EncodeTask(spool.path, frame, flags, *encoding) for frame, flags in spool.frames())
    writers: dict[int, IndexedWriter] = {}
    text_bytes: Counter[int] = Counter()
    done = 0
    with Meter("encoding", spool.text_bytes) as meter:
        for encoded in pool.map(encode_chunk, tasks):
            for flag, (ids, lengths, size) in sorted(encoded.splits.items()):
                if flag not in writers:
                    writers[flag] = IndexedWriter(folder / SPLITS[flag - 1], dtype)
                writers[flag].add(ids, lengths)
                text_bytes[flag] += size
            done += encoded.text_bytes
            meter.update(done)
    cards = {}
    for flag, writer in sorted(writers.items()):
        writer.finish()
        cards[SPLITS[flag - 1]] = card_of_written(writer, text_bytes[flag])
    return cards


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
    counts = {name: count for name, count in card.counts.items() if not name.startswith(_BAD)}
    if card.counts:
        yield f"  documents: {_format_counts(counts)}"


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

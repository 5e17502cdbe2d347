"""`megatrain prepare`: read, clean, deduplicate, split, train or load a tokenizer, encode, write. The only writer of datasets.

Three stages, each bounded in memory whatever the corpus: the source is cleaned by workers into a compressed spool on disk
(duplicates and the held-out split decided as it is written); the tokenizer is trained on a sample of it; workers encode the
spool, and the results are written in order. All happens in a hidden folder beside the target that becomes the dataset
by one rename, so that what looks whole is whole.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatrain.config import PrepareConfig, TokenizerConfig
from megatrain.config.flatten import flatten
from megatrain.data.adopt import check_prefixes, link, make_card
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
_NOT_IDENTITY = ("dir", "workers", "overwrite", "verify")


def prepare(config: PrepareConfig) -> Path:
    """Prepare the dataset that the config describes and return its folder. A finished one with the same settings is kept.

    Raises `ConfigError` (settings, paths, another dataset of that name), `DataError` (the text itself) or
    `EnvironmentFault` (a library or the hub is missing).
    """
    target = Path(config.data.dir) / config.data.name
    given = _given_tokenizer(config)
    opened = check_prefixes(config.data.paths) if config.data.kind == "megatron" else open_source(config.data)
    identity = opened.identity if isinstance(opened, Source) else {s: str(prefix) for s, prefix in opened.items()}
    settings = _settings(config)
    if _already(target, settings | {"source": identity}, given, config.data.overwrite):
        print(
            f"{target}: already prepared with these settings (data.overwrite=true prepares it again)", file=sys.stderr
        )
        return target
    with StagingFolder(target) as staging:
        if isinstance(opened, Source):
            card = _make(opened, config, given, staging.folder)
        else:
            link(opened, staging.folder)
            card = make_card(staging.folder, config.data.name, given)
            if given:
                given.save(staging.folder / "tokenizer")
        card.source, card.config = identity, settings
        card.save(staging.folder)
        staging.publish()
    print(_summary(target, card), file=sys.stderr)
    return target


def _make(source: Source, config: PrepareConfig, given: Tokenizer | None, folder: Path) -> Card:
    """Read, clean, tokenize and write; everything of the dataset but its card lies in `folder` afterwards."""
    with Workers(config.data.workers or usable_cores()) as pool, Spool(folder) as spool:
        cleaned = _clean(source, config, pool, spool, folder)
        tokenizer = given or _train_tokenizer(config.tokenizer, spool, cleaned)
        tokenizer.save(folder / "tokenizer")
        splits = _encode(spool, folder, tokenizer, pool)
    return Card(
        name=config.data.name,
        fingerprint=fingerprint(splits),
        splits=splits,
        tokenizer=TokenizerCard(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.end_of_document),
        counts=dict(sorted(cleaned.counts.items())),
    )


def _given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    if config.tokenizer.path:
        return find_tokenizer(config.tokenizer.kind, config.tokenizer.path)
    if config.tokenizer.kind != "sentencepiece" and config.data.kind != "megatron":
        raise ConfigError(
            f"tokenizer.path: missing; only sentencepiece is trained here, {config.tokenizer.kind} is loaded"
        )
    return None


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the dataset's content, as it stands in the card."""
    data = {key: value for key, value in asdict(config.data).items() if key not in _NOT_IDENTITY}
    return {"seed": config.seed, "data": data, "tokenizer": asdict(config.tokenizer)}


def _already(target: Path, settings: dict[str, Any], given: Tokenizer | None, overwrite: bool) -> bool:
    """Whether `target` is finished with these settings. Raises `ConfigError` when it is something else."""
    if not target.exists():
        return False
    if not (target / CARD).is_file():
        if target.is_dir() and not any(target.iterdir()):
            return False
        raise ConfigError(f"data.name: {target} exists and is not a prepared dataset; choose another data.name")
    if overwrite:
        return False
    card = check_dataset(target)
    was, now = flatten(card.config | {"source": card.source}), flatten(settings)
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
class Clean:
    """What cleaning learnt: counts, how many documents each split has, and which to train the tokenizer on."""

    sample: Sample
    counts: Counter[str] = field(default_factory=Counter)
    kept: Counter[int] = field(default_factory=Counter)
    lowest: tuple[int, int] | None = None  # (held-out draw, document): the first to be held out
    highest: tuple[int, int] | None = None


def _clean(source: Source, config: PrepareConfig, pool: Workers, spool: Spool, folder: Path) -> Clean:
    """Fill the spool; raises `DataError` when nothing is left to train on."""
    policy = Policy(config.data.text_column, config.data.undecodable)
    found = Clean(Sample(config.tokenizer.train_bytes))
    seen = Seen(folder / "seen.sqlite") if config.data.deduplicate else None
    tasks = (CleanTask(chunk, policy) for chunk in _chunks(source, config.data.max_documents))
    with Meter("reading", source.total_bytes) as meter:
        for cleaned in pool.map(clean_chunk, tasks):
            _keep(cleaned, spool, found, seen, config)
            meter.update(source.progress.bytes)
    if seen:
        seen.close()
    found.counts["oversized"] = source.progress.oversized
    if not sum(found.kept.values()):
        raise DataError(f"data={config.data.kind}: the corpus is empty ({_counted(found.counts)})")
    if config.data.heldout_fraction > 0:
        _at_least_one(spool, found, config.data.heldout_fraction)
    return found


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


def _keep(cleaned: Cleaned, spool: Spool, found: Clean, seen: Seen | None, config: PrepareConfig) -> None:
    """Decide what becomes of each document of a chunk, and write the chunk."""
    found.counts.update(cleaned.counts)
    held_below = int(config.data.heldout_fraction * 2**64)
    flags = bytearray(len(cleaned.sizes))
    draws: list[int] = []
    for i in range(len(flags)):
        digest = cleaned.hashes[16 * i : 16 * i + 16]
        draws.append(xxhash.xxh3_64_intdigest(b"sample" + digest, seed=config.seed))
        if seen is not None and not seen.add(digest):
            found.counts["duplicates"] += 1
            continue
        held = xxhash.xxh3_64_intdigest(b"heldout" + digest, seed=config.seed)
        flags[i] = HELDOUT if held < held_below else TRAIN
        found.kept[flags[i]] += 1
        place = (held, spool.documents + i)
        found.lowest = min(found.lowest or place, place)
        found.highest = max(found.highest or place, place)
    frame = spool.add(cleaned.frame, bytes(flags), sum(cleaned.sizes))
    for i, flag in enumerate(flags):
        if flag == TRAIN:
            found.sample.offer(draws[i], cleaned.sizes[i], frame, i)


def _at_least_one(spool: Spool, found: Clean, fraction: float) -> None:
    """Give a small corpus something to train on and something held out; a corpus of one document is cut in two."""
    assert found.lowest and found.highest
    if sum(found.kept.values()) == 1:
        _cut_in_two(spool, found, fraction)
    elif not found.kept[HELDOUT]:
        spool.set_flag(found.lowest[1], HELDOUT)
        found.sample.forget(*spool.locate(found.lowest[1]))
    elif not found.kept[TRAIN]:
        spool.set_flag(found.highest[1], TRAIN)
        frame, place = spool.locate(found.highest[1])
        found.sample.offer(0, len(unpack(spool.path, frame)[place]), frame, place)


def _cut_in_two(spool: Spool, found: Clean, fraction: float) -> None:
    """Hold out the last share of the only document, from the start of a line where there is one."""
    assert found.lowest
    frame, place = spool.locate(found.lowest[1])
    text = unpack(spool.path, frame)[place].decode()
    if len(text) < 2:
        raise DataError("the corpus is a single character; it cannot be held out in part: set data.heldout_fraction=0")
    middle = min(max(1, int(len(text) * (1 - fraction))), len(text) - 1)
    at = text.rfind("\n", 0, middle) + 1 or middle
    spool.set_flag(found.lowest[1], DROPPED)
    parts = [text[:at].encode(), text[at:].encode()]
    frame = spool.add(pack(parts), bytes([TRAIN, HELDOUT]), sum(map(len, parts)))
    found.counts["cut_in_two"] = 1
    found.sample = Sample(found.sample.budget)
    found.sample.offer(0, len(parts[0]), frame, 0)


# ---------------------------------------------------------------------------------------------------- encoding


def _train_tokenizer(config: TokenizerConfig, spool: Spool, cleaned: Clean) -> Tokenizer:
    start = time.monotonic()
    tokenizer = train_sentencepiece(cleaned.sample.texts(spool), config.vocab_size)
    print(f"tokenizer: trained {tokenizer.vocab_size} pieces in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return tokenizer


def _encode(spool: Spool, folder: Path, tokenizer: Tokenizer, pool: Workers) -> dict[str, Any]:
    """Write each split's pair in the order of the corpus; a split without documents is not written."""
    dtype = token_dtype(tokenizer.vocab_size)
    how = (folder / "tokenizer", tokenizer.fingerprint, dtype.name)
    tasks = (EncodeTask(spool.path, frame, flags, *how) for frame, flags in spool.frames())
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


def _counted(counts: Counter[str] | dict[str, int]) -> str:
    return (
        ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(counts.items()) if count)
        or "nothing read"
    )


def _summary(target: Path, card: Card) -> str:
    lines = [f"{target}: prepared, fingerprint {card.fingerprint}"]
    for name, split in card.splits.items():
        text = split.bytes or 0
        lines.append(
            f"  {name}: {split.documents:,} documents, {text / 1e6:.1f} MB of text, {split.tokens:,} tokens "
            f"({text / max(split.tokens, 1):.2f} bytes a token)"
        )
    lines.append(f"  documents: {_counted(card.counts)}")
    return "\n".join(lines)

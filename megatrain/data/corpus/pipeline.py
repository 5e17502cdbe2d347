"""From a source to token ids on disk, shard by shard: clean, select, encode, join.

Each stage keeps its finished shards in a work folder. A stage that is started again takes what is finished there and
does the rest; the result has the same bytes whatever was interrupted, and on any number of workers.
"""

from __future__ import annotations

import itertools
import json
import sys
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from megatrain.config import PrepareConfig
from megatrain.data.chat.layout import Layout
from megatrain.data.corpus.cleaned import CleanedShard, CleanedShardWriter, describe, pack, unpack
from megatrain.data.corpus.cleaning import CleanTask, clean_chunk
from megatrain.data.corpus.encoded import EncodedShard, EncodedShardWriter
from megatrain.data.corpus.encoding import EncodeTask, encode_chunk
from megatrain.data.corpus.fill_in_the_middle import FillInTheMiddle
from megatrain.data.corpus.part_files import closing_writers, remove_others
from megatrain.data.corpus.recipe import StepReport, add_reports, build_recipe, settings_of
from megatrain.data.corpus.record import Policy, Record
from megatrain.data.corpus.selection import HELDOUT, TRAIN, Selection, is_kept
from megatrain.data.corpus.shard import ALL, Shard, Share
from megatrain.data.corpus.signatures import Signing
from megatrain.data.corpus.source import Source
from megatrain.data.corpus.text_files import TextPart, TextTask, write_text
from megatrain.data.corpus.worker_pool import Workers
from megatrain.data.indexed import IndexedWriter
from megatrain.data.progress_line import Meter
from megatrain.data.tokenizer import Tokenizer, segments
from megatrain.errors import DataError

CHUNK_BYTES = 2**20
CHUNK_RECORDS = 2048
FORMAT = 7
"""Part of every key: raise it when the content of a cleaned or encoded shard changes."""

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------- cleaning


def clean_source(
    source: Source,
    config: PrepareConfig,
    pool: Workers,
    folder: Path,
    share: Share = ALL,
    layout: Layout | None = None,
) -> list[CleanedShard]:
    """Clean every shard of a source into `folder`, or a task's share, and return them in corpus order.

    `layout` has the template that messages are checked by. Raises `DataError` for bad input.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = config.data
    policy = Policy(data.text_column, data.undecodable, data.on_bad_record, data.kind, layout)
    recipe = build_recipe(config.clean.steps)
    signing = signing_of(config)
    settings = {name: getattr(data, name) for name in _CLEANS} | {
        "seed": config.seed,
        "recipe": settings_of(recipe),
        "signing": signing.settings() if signing else None,
        "versions": versions(_CLEANING_LIBRARIES) | {"unicode": unicodedata.unidata_version},
    }
    if layout:
        settings["layout"] = layout.template, layout.fingerprint, versions(["jinja2"])
    cleaned: list[CleanedShard | None] = []
    coming: deque[tuple[int, CleanedShardWriter, bool]] = deque()  # which shard each chunk is of, and whether its last
    left = data.max_documents
    found = 0

    def tasks() -> Iterator[CleanTask]:
        nonlocal left, found
        for place, shard in enumerate(source.shards()):
            if left == 0:
                return
            if not share.has(place):
                continue
            before = source.progress.bytes
            if finished := _find_cleaned(folder, shard, left, settings, data.on_bad_record):
                found += 1
                cleaned.append(finished)
                if left is not None:
                    left -= sum(finished.counts[name] for name in ("read", "left_out", "oversized"))
            else:
                key = _clean_key(shard, left, settings, data.on_bad_record)
                for step in recipe:
                    step.share(folder.parent / "tables")
                writer = CleanedShardWriter(folder, key, settings["signing"], data.write_text)
                cleaned.append(None)
                for chunk, last in _marking_last(chunks(itertools.islice(source.read(shard), left))):
                    if left is not None:
                        left -= len(chunk)
                    coming.append((len(cleaned) - 1, writer, last))
                    yield CleanTask(chunk, policy, recipe, config.seed, signing, data.write_text)
            if shard.num_bytes:  # the hub does not say
                source.progress.bytes = before + shard.num_bytes

    with Meter("reading", source.total_bytes if share.is_whole else None) as meter, closing_writers(coming):
        for result in pool.map(clean_chunk, tasks()):
            number, writer, last = coming.popleft()
            if len(result.documents):
                writer.add(result.frame, result.documents, result.signatures)
            writer.add_lines(result.about, result.removed)
            writer.count(result.counts, result.reports, result.first_bad, result.quarantine)
            if last:
                cleaned[number] = writer.finish()
            meter.update(source.progress.bytes)
    if found:
        print(f"{found} of {len(cleaned)} parts of the corpus were cleaned earlier and are used again", file=sys.stderr)
    done = [shard for shard in cleaned if shard]
    assert len(done) == len(cleaned)
    if share.is_whole:
        remove_others(folder, {shard.key for shard in done})
    return done


def signing_of(config: PrepareConfig) -> Signing | None:
    """Return how documents are signed, None if they need no signatures."""
    return Signing.of(config.clean.minhash) if config.clean.dedup == "minhash" else None


def total_counts(shards: Iterable[CleanedShard]) -> Counter[str]:
    """Return the sums of the counts of shards."""
    total: Counter[str] = Counter()
    for shard in shards:
        total.update(shard.counts)
    return total


def total_reports(shards: Iterable[CleanedShard]) -> list[StepReport]:
    """Return what each step of the recipe did to all shards."""
    total: list[StepReport] = []
    for shard in shards:
        reports = shard.reports()
        if total:
            add_reports(total, reports)
        else:
            total = reports
    return total


def _find_cleaned(
    folder: Path, shard: Shard, limit: int | None, settings: dict[str, Any], on_bad_record: str
) -> CleanedShard | None:
    """Return the shard if it is finished.

    One that was finished where bad records stop has none, so any policy will do, except that it has not kept the
    undecodable ones that `data.undecodable=skip` leaves out.
    """
    for policy in dict.fromkeys((on_bad_record, "stop")):
        finished = CleanedShard.find(folder, _clean_key(shard, limit, settings, policy))
        if finished and (policy == on_bad_record or not finished.counts["skipped_undecodable"]):
            return finished
    return None


_CLEANS = (
    *(
        "kind",
        "text_column",
        "join_comments",
        "hf_path",
        "hf_config",
        "hf_split",
        "max_document_bytes",
        "oversized",
        "undecodable",
    ),
    "write_text",
)


_CLEANING_LIBRARIES = (
    "datasets", "datatrove", "ftfy", "jieba", "mwparserfromhell", "phonenumbers", "pyarrow", "py3langid", "resiliparse",
    "spacy", "tldextract", "trafilatura", "transformers",
)  # fmt: skip
ENCODING_LIBRARIES = ("sentencepiece", "tokenizers")
"""Libraries of which another version may make other texts, other ids or other tokenizers."""


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Return the versions of those libraries that are installed: another one may give another text or other ids."""
    found = {}
    for library in libraries:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def _clean_key(shard: Shard, limit: int | None, settings: dict[str, Any], on_bad_record: str) -> str:
    return _key(asdict(shard), limit, settings, on_bad_record)


def _key(*parts: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([FORMAT, *parts], sort_keys=True).encode())


def chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield records in the pieces that workers clean: of about `CHUNK_BYTES`, at most `CHUNK_RECORDS`."""
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.payload)
        if size >= CHUNK_BYTES or len(chunk) >= CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _marking_last(chunks: Iterator[list[T]]) -> Iterator[tuple[list[T], bool]]:
    """Yield each chunk and whether it is the last; an empty one if there is none."""
    chunk = next(chunks, [])
    for following in chunks:
        yield chunk, False
        chunk = following
    yield chunk, True


# ---------------------------------------------------------------------------------------------------- selecting


def cut_in_two(shards: Sequence[CleanedShard], selection: Selection, fraction: float, path: Path) -> Selection:
    """Return a selection in which the end of the only document is held out, cut at the start of a line if possible.

    Raises `DataError` if the document is a single character.
    """
    number, index = selection.locate(int(np.flatnonzero(is_kept(selection.flags))[0]))
    only = shards[number]
    frame, at_in_frame = only.locate(index)
    text = unpack(only.text_path, frame)[at_in_frame].decode()
    if len(text) < 2:
        raise DataError("the corpus is a single character, too short to be split; set data.heldout_fraction=0")
    middle = min(max(1, int(len(text) * (1 - fraction))), len(text) - 1)
    at = text.rfind("\n", 0, middle) + 1 or middle
    writer = CleanedShardWriter(only.text_path.parent, _key(only.key, index, at))
    parts = [text[:at].encode(), text[at:].encode()]
    writer.add(pack(parts), describe(parts, 0))
    cut = Selection([writer.finish()], path)
    cut.flags[:] = TRAIN, HELDOUT
    return cut


def sample_texts(selection: Selection, budget: int) -> Iterator[str]:
    """Yield at least `budget` bytes of random documents to train on, in corpus order and in segments, if there are."""
    left = budget
    for shard, chosen in zip(selection.shards, selection.sample(budget), strict=True):
        wanted = iter(chosen)
        document = next(wanted, None)
        before = 0
        for frame in shard.frames:
            texts = None
            while document is not None and document < before + frame.documents:
                texts = texts or unpack(shard.text_path, frame)
                for segment in segments(texts[document - before].decode()):
                    if left > 0:
                        left -= len(segment.encode())
                        yield segment
                document = next(wanted, None)
            before += frame.documents


# ---------------------------------------------------------------------------------------------------- encoding


def encode_selection(
    selection: Selection,
    tokenizer: Tokenizer,
    saved: Path,
    dtype: np.dtype,
    pool: Workers,
    folder: Path,
    share: Share = ALL,
    fim: FillInTheMiddle | None = None,
    chat: str | None = None,
) -> list[EncodedShard]:
    """Encode every shard into `folder`, or a task's share, and return them in corpus order.

    `saved` is the tokenizer's folder. Documents are conversations if there is a template for them, `chat`.
    """
    folder.mkdir(exist_ok=True)
    mine = [number for number in range(len(selection.shards)) if share.has(number)]
    text_bytes = sum(selection.shards[number].text_bytes for number in mine)
    encoding = (saved, tokenizer.fingerprint, tokenizer.starts_with_bos, dtype.name, fim, chat)
    ends = (tokenizer.start(), tokenizer.end_of_document)
    made_by: tuple[object, ...] = (tokenizer.fingerprint, ends, dtype.name, versions(ENCODING_LIBRARIES))
    if fim:
        made_by += (asdict(fim),)
    if chat:
        made_by += (chat, versions(["jinja2"]))
    encoded: list[EncodedShard | None] = []
    coming: deque[tuple[int, EncodedShardWriter, bool]] = deque()
    done = 0

    def tasks() -> Iterator[EncodeTask]:
        nonlocal done
        for number in mine:
            shard, flags = selection.shards[number], selection.flags_of(number).tobytes()
            key = _key(shard.key, xxhash.xxh3_128_hexdigest(flags), *made_by)
            if finished := EncodedShard.find(folder, key):
                encoded.append(finished)
                done += shard.text_bytes
                continue
            writer = EncodedShardWriter(folder, key)
            if not shard.frames:
                encoded.append(writer.finish())
                continue
            encoded.append(None)
            before = 0
            for frame in shard.frames:
                coming.append((len(encoded) - 1, writer, frame is shard.frames[-1]))
                yield EncodeTask(shard.text_path, frame, flags[before : before + frame.documents], *encoding)
                before += frame.documents

    with Meter("encoding", text_bytes) as meter, closing_writers(coming):
        for result in pool.map(encode_chunk, tasks()):
            number, writer, last = coming.popleft()
            for split, found in result.splits.items():
                writer.add(split, found)
            if last:
                encoded[number] = writer.finish()
            done += result.text_bytes
            meter.update(done)
    finished_shards = [shard for shard in encoded if shard]
    assert len(finished_shards) == len(mine)
    if share.is_whole:
        remove_others(folder, {shard.key for shard in finished_shards})
    return finished_shards


def write_texts(
    documents: Selection, whole: Selection, pool: Workers, folder: Path, share: Share = ALL
) -> list[TextPart]:
    """Write the text of every shard into `folder`, or of a task's share, and return the parts in corpus order.

    `documents` is the selection among the cleaned shards, `whole` the one without repeated passages.
    """
    folder.mkdir(exist_ok=True)
    mine = [number for number in range(len(documents.shards)) if share.has(number)]
    keys: list[str] = []
    done = 0

    def tasks() -> Iterator[TextTask]:
        nonlocal done
        for number in mine:
            pairs = [(one.shards[number], one.flags_of(number).tobytes()) for one in (documents, whole)]
            hashes = [(shard.key, xxhash.xxh3_128_hexdigest(flags)) for shard, flags in pairs]
            keys.append(_key(hashes, versions(["zstandard"])))
            if TextPart.find(folder, keys[-1]):
                done += pairs[1][0].text_bytes
            else:
                yield TextTask(*pairs[0], *pairs[1], folder, keys[-1])

    with Meter("writing", sum(whole.shards[number].text_bytes for number in mine)) as meter:
        for size in pool.map(write_text, tasks()):
            done += size
            meter.update(done)
    if share.is_whole:
        remove_others(folder, set(keys))
    return [TextPart(folder, key) for key in keys]


def join(shards: Sequence[EncodedShard], split: int, prefix: Path, dtype: np.dtype) -> tuple[IndexedWriter, int] | None:
    """Write a split's files from its shards, in order; return the finished writer and the bytes of text.

    None if the split has no documents.
    """
    if not any(split in shard.text_bytes for shard in shards):
        return None
    writer = IndexedWriter(prefix, dtype)
    for shard in shards:
        for ids, lengths, counts in shard.read(split, dtype):
            writer.add(ids, lengths, counts)
    writer.finish()
    return writer, sum(shard.text_bytes.get(split, 0) for shard in shards)

"""Cut out of documents the passages, lines or paragraphs, that repeat earlier text of the corpus.

The order is that of the corpus: files as the source sorts them, the documents of a file and the passages of a document
as they follow one another. The first of equal passages stays, wherever the others are, so the result depends neither on
shards nor on the number of workers. Memory is bounded; hashes and flags of passages wait on disk.
"""

from __future__ import annotations

import re
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from megatrain.data.corpus.cleaned import CleanedShard, CleanedShardWriter, Frame, describe, pack, unpack
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.part_files import closing_writers, remove_others
from megatrain.data.corpus.recipe import StepReport, add_reports, run_recipe
from megatrain.data.corpus.selection import HELDOUT, TRAIN, Selection
from megatrain.data.corpus.worker_pool import Workers
from megatrain.data.progress_line import Meter

SEPARATORS = {"lines": re.compile(r"(\n)"), "paragraphs": re.compile(r"(\n[ \t]*(?:\n[ \t]*)+)")}
"""What separates passages, by the value of `clean.dedup_passages`."""

_FORMAT = 3
"""Raise it when other passages are cut out of the same documents."""
_ROW = np.dtype([("hash", "<u8", (2,)), ("place", "<u8")])
"""The xxh3-128 of a passage, and its number among all passages of the corpus that count."""
_BYTES_A_ROW = 160  # of memory, while rows are sorted
_MAX_RUNS = 256  # files that are written at a time


@dataclass(frozen=True)
class Passages:
    """Which passages count: lines or paragraphs of at least `min_characters`, without the whitespace around them."""

    unit: str
    min_characters: int

    def split(self, text: str) -> tuple[list[str], list[str], list[bool]]:
        """Return the passages of a text, the separators between them, and which passages count."""
        parts = SEPARATORS[self.unit].split(text)
        passages = parts[::2]
        return passages, parts[1::2], [len(passage.strip()) >= self.min_characters for passage in passages]


@dataclass(frozen=True)
class _Task:
    """A frame of a shard: its documents' flags, the first one's number in the corpus, the flags of its passages."""

    path: Path
    frame: Frame
    flags: bytes
    first: int
    passages: Passages
    later: bytes = b""
    seed: int = 0

    def texts(self) -> Iterator[tuple[int, str]]:
        """Yield the documents that are kept, and their numbers."""
        for at, (flag, text) in enumerate(zip(self.flags, unpack(self.path, self.frame), strict=True)):
            if flag in (TRAIN, HELDOUT):
                yield self.first + at, text.decode()


@dataclass(frozen=True)
class _Cut:
    """A frame without the later passages, `describe` of its documents, their numbers, and those of the gone ones."""

    frame: bytes
    documents: np.ndarray
    report: StepReport
    kept: list[int]
    gone: list[int]


def cut_passages(
    selection: Selection, passages: Passages, pool: Workers, folder: Path, memory_bytes: int, seed: int
) -> tuple[Selection, StepReport]:
    """Cut repeated passages out of the documents that are kept; return a selection of the shards so made, and counts.

    A document of which nothing is left is removed. `folder` keeps the new shards, of which finished ones are used
    again, and files that are removed at the end. About `memory_bytes` are used, whatever the size of the corpus.
    """
    folder.mkdir(exist_ok=True)
    sorting = folder / "sorting"
    shutil.rmtree(sorting, ignore_errors=True)
    sorting.mkdir()
    counts, runs = _hash(selection, passages, pool, sorting, memory_bytes)
    later = _flag_later(sorting, runs, sum(map(sum, counts)), memory_bytes)
    shards, report = _cut(selection, passages, pool, folder, counts, later, seed)
    del later
    shutil.rmtree(sorting)
    remove_others(folder, {shard.key for shard in shards})
    return Selection(shards, selection.path.with_name("flags_of_cut")), report


# ---------------------------------------------------------------------------------------------------- hashing


def _hash_passages(task: _Task) -> np.ndarray:
    """Return the hashes of the passages that count, `[passages, 2]`, in order."""
    digests = []
    for _, text in task.texts():
        found, _, count = task.passages.split(text)
        digests += [
            xxhash.xxh3_128_digest(passage.strip().encode())
            for passage, counts in zip(found, count, strict=True)
            if counts
        ]
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def _hash(
    selection: Selection, passages: Passages, pool: Workers, folder: Path, memory_bytes: int
) -> tuple[list[list[int]], int]:
    """Write the rows of all passages into runs by their hash; return the passages of each frame, and the runs."""
    text_bytes = sum(shard.text_bytes for shard in selection.shards)
    most = text_bytes // passages.min_characters + 1
    runs = min(_MAX_RUNS, max(1, -(-most * _BYTES_A_ROW // memory_bytes)))
    counts: list[list[int]] = [[0] * len(shard.frames) for shard in selection.shards]
    places = iter([(number, at) for number, shard in enumerate(selection.shards) for at in range(len(shard.frames))])
    files = [open(folder / str(run), "wb") for run in range(runs)]  # noqa: SIM115, closed below
    stored = sum(frame.size for shard in selection.shards for frame in shard.frames)
    before = done = 0
    try:
        with Meter("passages", stored) as meter:
            tasks = (
                _Task(*of_frame, passages) for number in range(len(counts)) for of_frame in _frames(selection, number)
            )
            for hashes in pool.map(_hash_passages, tasks):
                number, at = next(places)
                counts[number][at] = len(hashes)
                _append(files, hashes, before)
                before += len(hashes)
                done += selection.shards[number].frames[at].size  # as stored
                meter.update(done)
    finally:
        for file in files:
            file.close()
    return counts, runs


def _frames(selection: Selection, number: int) -> Iterator[tuple[Path, Frame, bytes, int]]:
    """Yield each frame of a shard: the shard's path, the frame, its documents' flags, the first document's number."""
    shard, flags, before = selection.shards[number], selection.flags_of(number).tobytes(), 0
    for frame in shard.frames:
        yield shard.text_path, frame, flags[before : before + frame.documents], selection.starts[number] + before
        before += frame.documents


def _append(files: Sequence[BinaryIO], hashes: np.ndarray, before: int) -> None:
    rows = np.zeros(len(hashes), _ROW)
    rows["hash"] = hashes
    rows["place"] = np.arange(before, before + len(hashes))
    run = (rows["hash"][:, 0] % np.uint64(len(files))).astype(np.int64)
    order = np.argsort(run, kind="stable")
    ends = np.searchsorted(run[order], np.arange(len(files) + 1))
    for number in np.flatnonzero(np.diff(ends)).tolist():
        files[number].write(rows[order[ends[number] : ends[number + 1]]].tobytes())


# ---------------------------------------------------------------------------------------------------- comparing


def _flag_later(folder: Path, runs: int, num_passages: int, memory_bytes: int) -> np.ndarray:
    """Return a flag for each passage that counts: 1 for all but the first of equal ones. It lives in a file."""
    if not num_passages:
        return np.zeros(0, np.uint8)
    later: np.ndarray = np.memmap(folder / "later", np.uint8, "w+", shape=(num_passages,))
    block = max(1, memory_bytes // _BYTES_A_ROW // 2)
    for run in range(runs):
        path = folder / str(run)
        passes = -(-path.stat().st_size // _ROW.itemsize // block)
        for number in range(passes):  # one, unless a run is too large
            first = np.zeros(0, _ROW)
            with open(path, "rb") as file:
                while data := file.read(block * _ROW.itemsize):
                    rows = np.frombuffer(data, _ROW)
                    if passes > 1:
                        rows = rows[rows["hash"][:, 1] % np.uint64(passes) == number]
                    both = np.concatenate([first, rows])
                    both = both[np.lexsort((both["hash"][:, 1], both["hash"][:, 0]))]  # stable: the first stays first
                    again = np.zeros(len(both), bool)
                    again[1:] = (both["hash"][1:] == both["hash"][:-1]).all(axis=1)
                    later[both["place"][again]] = 1
                    first = both[~again]
        path.unlink()
    return later


# ---------------------------------------------------------------------------------------------------- cutting


@dataclass(frozen=True)
class _Cutter(Step):
    """Cuts the passages whose flags say so, of one document after another: reported as a cleaning step is."""

    passages: Passages
    later: Iterator[int]

    def apply(self, document: Document) -> Removal | None:
        found, separators, count = self.passages.split(document.text)
        cut = [counts and bool(next(self.later)) for counts in count]
        unit = self.passages.unit
        document.count(unit, sum(cut))
        if any(cut):
            document.text = _joined(found, separators, cut)
            if not document.text.strip():
                return Removal("nothing_left", f"all its {unit} repeat earlier text of the corpus")
        return None


def _cut_frame(task: _Task) -> _Cut:
    """Cut the later passages out of a frame's documents."""
    report = StepReport(f"duplicate_{task.passages.unit}")
    recipe = (_Cutter(task.passages, iter(task.later)),)
    texts, kept, gone = [], [], []
    for number, text in task.texts():
        document = Document(text, str(number))
        if run_recipe(recipe, document, [report], task.seed):
            texts.append(document.text.encode())
            kept.append(number)
        else:
            gone.append(number)
    return _Cut(pack(texts), describe(texts, task.seed), report, kept, gone)


def _joined(passages: list[str], separators: list[str], cut: list[bool]) -> str:
    """Join the passages that are not cut, each after the separator before it, without empty lines at either end."""
    kept: list[str] = []
    for separator, passage, is_cut in zip(["", *separators], passages, cut, strict=True):
        if not is_cut:
            kept += [separator, passage] if kept else [passage]
    return "".join(kept).strip("\n")


def _cut(
    selection: Selection,
    passages: Passages,
    pool: Workers,
    folder: Path,
    counts: list[list[int]],
    later: np.ndarray,
    seed: int,
) -> tuple[list[CleanedShard], StepReport]:
    """Write each shard anew without the later passages."""
    done: list[CleanedShard | None] = [None] * len(selection.shards)
    coming: deque[tuple[int, CleanedShardWriter, bool]] = deque()
    starts = np.cumsum([0, *map(sum, counts)]).tolist()

    def tasks() -> Iterator[_Task]:
        for number, shard in enumerate(selection.shards):
            of_shard = later[starts[number] : starts[number + 1]].tobytes()
            flags = selection.flags_of(number).tobytes()
            key = _key(shard, passages, seed, selection.starts[number], flags, of_shard)
            if finished := CleanedShard.find(folder, key):
                done[number] = finished
                continue
            writer = CleanedShardWriter(folder, key)
            if not shard.frames:
                done[number] = writer.finish()
            before = 0
            for at, of_frame in enumerate(_frames(selection, number)):
                after = before + counts[number][at]
                coming.append((number, writer, at == len(shard.frames) - 1))
                yield _Task(*of_frame, passages, of_shard[before:after], seed)
                before = after

    written = 0
    with Meter("cutting", None) as meter, closing_writers(coming):
        for result in pool.map(_cut_frame, tasks()):
            number, writer, last = coming.popleft()
            if len(result.documents):
                known = selection.shards[number].documents()[np.array(result.kept) - selection.starts[number]]
                for name in ("heldout_draw", "sample_draw"):  # an original and its augmented copy share them
                    result.documents[name] = known[name]
                writer.add(result.frame, result.documents)
            writer.count({}, [result.report], None, b"")
            writer.gone += [one - selection.starts[number] for one in result.gone]
            if last:
                done[number] = writer.finish()
            written += result.report.bytes_in
            meter.update(written)
    shards = [shard for shard in done if shard]
    assert len(shards) == len(selection.shards)
    total = [StepReport(f"duplicate_{passages.unit}")]
    for shard in shards:
        if reports := shard.reports():
            add_reports(total, reports)
    return shards, total[0]


def _key(shard: CleanedShard, passages: Passages, seed: int, first: int, flags: bytes, later: bytes) -> str:
    """Return the key of a shard that is cut; the numbers of its examples count from `first`."""
    settings = f"{_FORMAT} {shard.key} {passages} {seed} {first} {xxhash.xxh3_128_hexdigest(flags)}"
    return xxhash.xxh3_128_hexdigest(f"{settings} {xxhash.xxh3_128_hexdigest(later)}".encode())

"""What prepare's worker processes do with a chunk of documents, and the bounded, ordered map that runs them.

The results are pure functions of the arguments, so the number of workers affects only speed. Files are written in
spool.py and preparation.py.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import xxhash

from megatrain.data.normalise import BadRecordError, Policy, Problem, Record, clean
from megatrain.data.spool import DROPPED, Frame, pack, unpack
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import DataError, EnvironmentFault
from megatrain.resilience.signals import set_parent_death_signal

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """A pool of `count` worker processes; with a count of 1 the work is done in this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        # "spawn" inherits no threads or locks of this process.
        context = multiprocessing.get_context("spawn")
        self._pool = (
            ProcessPoolExecutor(count, mp_context=context, initializer=_follow_parent, initargs=(os.getpid(),))
            if count > 1
            else None
        )

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield `function` of each item, in order, with at most `2 * count` items in flight.

        Raises `EnvironmentFault` if a worker process dies.
        """
        if self._pool is None:
            yield from map(function, items)
            return
        in_flight: deque[Future[R]] = deque()
        try:
            for item in items:
                in_flight.append(self._pool.submit(function, item))
                if len(in_flight) >= 2 * self.count:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                "a worker process of prepare died (out of memory?); "
                "try a smaller data.workers or data.max_document_bytes"
            ) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent(parent: int) -> None:
    """Leave Ctrl-C to the parent, which receives it too; on Linux, die with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal(parent)


# ---------------------------------------------------------------------------------------------------- cleaning


@dataclass(frozen=True)
class CleanTask:
    """Records to clean, and the policy for bad ones."""

    records: list[Record]
    policy: Policy


@dataclass(frozen=True)
class Cleaned:
    """Clean documents as a spool frame, their concatenated xxh3-128 hashes (16 bytes each), byte sizes, and counts.

    `first_bad` describes the first bad record, and `quarantine` has a line of JSON for each if they are to be kept.
    """

    frame: bytes
    hashes: bytes
    sizes: list[int]
    counts: dict[str, int]
    first_bad: str | None
    quarantine: bytes


def clean_chunk(task: CleanTask) -> Cleaned:
    """Decode and normalise records; empty records and those that the policy skips are left out and counted.

    Raises `DataError` for the first bad record if the policy is to stop there.
    """
    texts: list[bytes] = []
    counts = dict.fromkeys(("read", "empty", "bad", "undecodable", "skipped_undecodable"), 0)
    counts["read"] = len(task.records)
    first_bad, quarantine = None, []
    for record in task.records:
        try:
            text, undecodable = clean(record, task.policy)
        except BadRecordError as error:
            problem = error.problem
            first_bad = first_bad or f"{record.where}: {problem.message}"
            _count_bad(record, problem, task.policy, counts)
            if task.policy.on_bad_record == "quarantine":
                quarantine.append(_quarantined(record, problem))
            continue
        counts["undecodable"] += undecodable
        if text:
            texts.append(text.encode())
        else:
            counts["empty"] += 1
    hashes = b"".join(xxhash.xxh3_128_digest(text) for text in texts)
    return Cleaned(pack(texts), hashes, [len(text) for text in texts], counts, first_bad, b"".join(quarantine))


def _count_bad(record: Record, problem: Problem, policy: Policy, counts: dict[str, int]) -> None:
    if problem.kind == "undecodable":  # data.undecodable=skip has been chosen for it
        counts["undecodable"] += 1
        counts["skipped_undecodable"] += 1
        return
    if policy.on_bad_record == "stop":
        raise DataError(
            f"{record.where}: {problem.message}; {problem.remedy}, or set data.on_bad_record=skip or quarantine"
        )
    counts["bad"] += 1
    counts[f"bad_{problem.kind}"] = counts.get(f"bad_{problem.kind}", 0) + 1


def _quarantined(record: Record, problem: Problem) -> bytes:
    """Return a bad record as a line of JSON: where it was, the reason, and what was read."""
    payload = record.payload
    text = payload.decode(errors="backslashreplace") if isinstance(payload, bytes) else payload
    line = {"where": record.where, "reason": problem.kind, "message": problem.message, "record": text.rstrip("\r\n")}
    return json.dumps(line).encode() + b"\n"


# ---------------------------------------------------------------------------------------------------- tokenizing


@dataclass(frozen=True)
class EncodeTask:
    """A spool frame, a flag per document (`DROPPED` or its split's number), and the tokenizer and dtype to use."""

    spool: Path
    frame: Frame
    flags: bytes
    tokenizer: Path
    fingerprint: str
    starts_with_bos: bool
    dtype: str


@dataclass(frozen=True)
class Encoded:
    """Per split: its documents' concatenated token ids, the number of ids in each, and their bytes of text.

    `text_bytes` counts dropped documents too.
    """

    splits: dict[int, tuple[np.ndarray, np.ndarray, int]]
    text_bytes: int


@functools.lru_cache(maxsize=1)
def _load(folder: Path, fingerprint: str, starts_with_bos: bool) -> Tokenizer:
    """Load the tokenizer once per process; the cache key has its properties because the folder may be rewritten."""
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.fingerprint, tokenizer.starts_with_bos) == (fingerprint, starts_with_bos)
    return tokenizer


def encode_chunk(task: EncodeTask) -> Encoded:
    """Encode the kept documents of a frame, each between BOS (if the dataset has it) and the end-of-document token."""
    tokenizer = _load(task.tokenizer, task.fingerprint, task.starts_with_bos)
    found: dict[int, tuple[list[np.ndarray], list[int], int]] = {}
    total = 0
    for flag, text in zip(task.flags, unpack(task.spool, task.frame), strict=True):
        total += len(text)
        if flag == DROPPED:
            continue
        ids = [*tokenizer.start(), *tokenizer.encode(text.decode()), tokenizer.end_of_document]
        arrays, lengths, size = found.get(flag, ([], [], 0))
        arrays.append(np.array(ids, dtype=task.dtype))
        lengths.append(len(ids))
        found[flag] = (arrays, lengths, size + len(text))
    return Encoded(
        {f: (np.concatenate(a), np.array(n, dtype=np.int32), size) for f, (a, n, size) in found.items()}, total
    )

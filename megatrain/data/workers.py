"""What worker processes do to a chunk of documents, and the bounded, ordered map that drives them.

Everything here is a pure function of its arguments, so the number of workers changes the speed and nothing else. Writing
files is spool.py's and prepare.py's.
"""

from __future__ import annotations

import functools
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

from megatrain.data.normalise import Policy, Record, clean
from megatrain.data.spool import DROPPED, Frame, pack, unpack
from megatrain.data.tokenizer import Tokenizer
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import EnvironmentFault
from megatrain.resilience.signals import set_parent_death_signal

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """`count` worker processes (none for 1: the work is then done here)."""

    def __init__(self, count: int) -> None:
        self.count = count
        # "spawn" inherits no threads or locks of this process.
        context = multiprocessing.get_context("spawn")
        self._pool = (
            ProcessPoolExecutor(count, mp_context=context, initializer=_live_and_die_with, initargs=(os.getpid(),))
            if count > 1
            else None
        )

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`function` of each item, in order; at most `2 * count` items are under way at a time."""
        if self._pool is None:
            yield from map(function, items)
            return
        under_way: deque[Future[R]] = deque()
        try:
            for item in items:
                under_way.append(self._pool.submit(function, item))
                if len(under_way) >= 2 * self.count:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                "a worker process of prepare died (out of memory?); try a smaller data.workers or data.max_document_bytes"
            ) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _live_and_die_with(parent: int) -> None:
    """Ctrl-C reaches every process of the terminal; the parent ends the workers, which then have nothing to say. Nor do
    they outlive a parent that was killed (on Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        set_parent_death_signal(parent)


# ---------------------------------------------------------------------------------------------------- cleaning


@dataclass(frozen=True)
class CleanTask:
    """Records to clean."""

    records: list[Record]
    policy: Policy


@dataclass(frozen=True)
class Cleaned:
    """Clean documents as a spool frame, the xxh3-128 (16 bytes) of each one after another, the text bytes of each, counts."""

    frame: bytes
    hashes: bytes
    sizes: list[int]
    counts: dict[str, int]


def clean_chunk(task: CleanTask) -> Cleaned:
    """Decode and normalise records; empty ones and ones skipped by policy are left out and counted."""
    texts: list[bytes] = []
    counts = {"read": len(task.records), "empty": 0, "undecodable": 0, "skipped_undecodable": 0}
    for record in task.records:
        text, bad = clean(record, task.policy)
        counts["undecodable"] += bad
        if text is None:
            counts["skipped_undecodable"] += 1
        elif not text:
            counts["empty"] += 1
        else:
            texts.append(text.encode())
    hashes = b"".join(xxhash.xxh3_128_digest(text) for text in texts)
    return Cleaned(pack(texts), hashes, [len(text) for text in texts], counts)


# ---------------------------------------------------------------------------------------------------- tokenizing


@dataclass(frozen=True)
class EncodeTask:
    """A frame of the spool, one flag a document (`DROPPED`, or the number of its split), and how to encode."""

    spool: Path
    frame: Frame
    flags: bytes
    tokenizer: Path
    fingerprint: str
    dtype: str


@dataclass(frozen=True)
class Encoded:
    """Per split: token ids of its documents one after another, ids of each, and the bytes of text they stand for."""

    splits: dict[int, tuple[np.ndarray, np.ndarray, int]]
    text_bytes: int


@functools.lru_cache(maxsize=1)
def _load(folder: Path, fingerprint: str) -> Tokenizer:
    """One tokenizer a process; the fingerprint keeps another one from the same folder apart."""
    tokenizer = load_tokenizer(folder)
    assert tokenizer.fingerprint == fingerprint
    return tokenizer


def encode_chunk(task: EncodeTask) -> Encoded:
    """Encode the kept documents of a frame, each followed by the end-of-document token."""
    tokenizer = _load(task.tokenizer, task.fingerprint)
    found: dict[int, tuple[list[np.ndarray], list[int], int]] = {}
    total = 0
    for flag, text in zip(task.flags, unpack(task.spool, task.frame), strict=True):
        total += len(text)
        if flag == DROPPED:
            continue
        ids = tokenizer.encode(text.decode())
        ids.append(tokenizer.end_of_document)
        arrays, lengths, size = found.get(flag, ([], [], 0))
        arrays.append(np.array(ids, dtype=task.dtype))
        lengths.append(len(ids))
        found[flag] = (arrays, lengths, size + len(text))
    return Encoded(
        {f: (np.concatenate(a), np.array(n, dtype=np.int32), size) for f, (a, n, size) in found.items()}, total
    )

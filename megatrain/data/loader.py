"""Build batches from sample numbers: a training stream with a prefetch thread, and held-out batches.

`order.py` decides the order of samples. A rank's share of a step depends only on (dp_rank, dp_size), so a step has the
same samples in every parallel layout.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
import xxhash

from megatrain.data.batch import MicroBatch, Pairs, StepBatch
from megatrain.data.dataset import Dataset
from megatrain.data.order import Order, merge_ranges, take
from megatrain.data.samples import PackedSamples, Sample, Samples, open_heldout
from megatrain.kernels import IGNORE_INDEX
from megatrain.kernels.attention import Documents


def sample_hash(ids: np.ndarray) -> int:
    """Return the xxh3-64 of one sample's T+1 ids, hashed as little-endian int32."""
    return xxhash.xxh3_64_intdigest(ids.astype("<i4").tobytes())


def step_hash(hashes: np.ndarray) -> str:
    """Return a step's `batch_hash` (16 hex digits): the xxh3-64 of its samples' hashes (uint64, in sample order)."""
    return xxhash.xxh3_64_hexdigest(np.asarray(hashes).astype("<u8").tobytes())


def samples_of_rank(samples: np.ndarray, micro_batch_size: int, dp_rank: int, dp_size: int) -> np.ndarray:
    """Return one data-parallel rank's share of a step's samples `[G]` as `[num_micro_batches, micro_batch_size]`.

    Sample `j` of a step (from 0) goes to rank `(j // micro_batch_size) % dp_size`, into that rank's micro-batch
    `j // (dp_size * micro_batch_size)`, as its row `j % micro_batch_size`. `in_sample_order` is the inverse.
    """
    return samples.reshape(-1, dp_size, micro_batch_size)[:, dp_rank]


def in_sample_order(by_rank: np.ndarray, micro_batch_size: int) -> np.ndarray:
    """Return `[G]` values, one per sample, in the order of the step's samples: the inverse of `samples_of_rank`.

    `by_rank` is `[dp_size, num_micro_batches * micro_batch_size]`: each rank's values in micro-batch order.
    """
    return by_rank.reshape(len(by_rank), -1, micro_batch_size).transpose(1, 0, 2).reshape(-1)


class TrainStream:
    """One rank's endless sequence of `StepBatch`es from `first_step` and `cursor` on, prefetched by a thread.

    A step reads the next G = `batch_size(step)` samples from the cursor on, outside the skip ranges; `samples_of_rank`
    gives this rank's share of them. `end_of_document` and `reset_positions` are as in `micro_batch_of`. Errors in the
    thread, such as a `DataError` for a damaged block, are raised in the consumer. Call `close` when done.
    """

    def __init__(
        self,
        samples: Samples,
        order: Order,
        *,
        vocab_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        batch_size: Callable[[int], int],
        first_step: int,
        cursor: int,
        skip_ranges: Iterable[tuple[int, int]] = (),
        end_of_document: int | None = None,
        reset_positions: bool = False,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        assert order.seq_len == samples.seq_len
        self._samples, self._order = samples, order
        self._vocab_size, self._micro_batch_size = vocab_size, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._batch_size, self._skip_ranges = batch_size, merge_ranges(skip_ranges)
        self._end_of_document, self._reset_positions = end_of_document, reset_positions
        self._pin_memory = pin_memory
        self._prefetch = prefetch
        self._start(first_step, cursor)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        while not self._closed.is_set():
            try:
                item = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self._closed.set()
                raise item
            return item
        raise StopIteration

    def close(self, timeout_s: float = 10.0) -> bool:
        """Stop the thread and return whether it ended within `timeout_s`. A daemon thread, it never delays exit."""
        self._closed.set()
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def state(self, step: int) -> dict[str, torch.Tensor]:
        """Return what a checkpoint needs of the stream besides step and cursor: nothing."""
        return {}

    def restart(self, first_step: int, cursor: int, skip_ranges: Iterable[tuple[int, int]]) -> None:
        """Drop the prefetched batches and continue from another step and cursor, with other skip ranges."""
        self.close()
        self._skip_ranges = merge_ranges(skip_ranges)
        self._start(first_step, cursor)

    def _start(self, first_step: int, cursor: int) -> None:
        """Start a thread with its own queue and stop event, so that an old thread in a slow read cannot disturb it."""
        self._queue: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=self._prefetch)
        self._closed = threading.Event()
        arguments = first_step, cursor, self._skip_ranges, self._queue, self._closed
        self._thread = threading.Thread(target=self._fill, args=arguments, name="megatrain-loader", daemon=True)
        self._thread.start()

    def _fill(
        self,
        step: int,
        cursor: int,
        skip_ranges: list[tuple[int, int]],
        filled: queue.Queue[StepBatch | BaseException],
        closed: threading.Event,
    ) -> None:
        def put(item: StepBatch | BaseException) -> None:
            while not closed.is_set():
                try:
                    return filled.put(item, timeout=0.1)
                except queue.Full:
                    continue

        try:
            while not closed.is_set():
                batch = self._read_step(step, cursor, skip_ranges)
                put(batch)
                step, cursor = step + 1, batch.cursor
        except BaseException as error:  # any error is raised in the consumer
            put(error)

    def _read_step(self, step: int, cursor: int, skip_ranges: list[tuple[int, int]]) -> StepBatch:
        size = self._batch_size(step)
        rows = self._micro_batch_size * self._dp_size
        assert size > 0 and size % rows == 0, (size, self._micro_batch_size, self._dp_size)
        positions, cursor = take(cursor, size, skip_ranges)
        own = samples_of_rank(positions, self._micro_batch_size, self._dp_rank, self._dp_size)
        windows = self._order.windows(own.reshape(-1)).tolist()
        samples = [self._samples.read(window, self._vocab_size) for window in windows]
        ids = padded_ids(samples, self._order.seq_len)
        hashes = np.array([sample_hash(row) for row in ids], dtype=np.uint64)
        micro_batches = []
        for first in range(0, len(samples), self._micro_batch_size):
            own_rows = slice(first, first + self._micro_batch_size)
            micro_batch = micro_batch_of(samples[own_rows], ids[own_rows], self._end_of_document, self._reset_positions)
            micro_batches.append(micro_batch.pin_memory() if self._pin_memory else micro_batch)
        return StepBatch(micro_batches, hashes, size, cursor)


def padded_ids(samples: Sequence[Sample], seq_len: int) -> np.ndarray:
    """Return the samples' ids as int64 `[B, T+1]`, padded with 0."""
    ids = np.zeros((len(samples), seq_len + 1), np.int64)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample.ids)] = sample.ids
    return ids


def micro_batch_of(
    samples: Sequence[Sample], ids: np.ndarray, end_of_document: int | None, reset_positions: bool
) -> MicroBatch:
    """Return the micro-batch of some samples, given their `padded_ids`.

    Labels of padding, those that do not continue their document, and those that do not count are `IGNORE_INDEX`. If
    `end_of_document` (the token that ends each document) is given, the micro-batch has the samples' documents; with
    `reset_positions` also positions that begin at 0 in each. Padding counts as a document.
    """
    tokens, labels = ids[:, :-1].copy(), ids[:, 1:].copy()
    for row, sample in zip(labels, samples, strict=True):
        row[max(0, len(sample.ids) - 1) :] = IGNORE_INDEX
        row[list(sample.unrelated)] = IGNORE_INDEX
        if sample.counts is not None:
            row[: len(sample.ids) - 1][~sample.counts[1:]] = IGNORE_INDEX
    pieces = [_input_pieces(sample.pieces, tokens.shape[1]) for sample in samples if sample.pieces is not None]
    tensors = torch.from_numpy(tokens), torch.from_numpy(labels)
    micro_batch = with_documents(*tensors, end_of_document, reset_positions, pieces or None)
    if any(sample.pairs is not None for sample in samples):
        return replace(micro_batch, pairs=pairs_of(samples, tensors[1]))
    return micro_batch


def pairs_of(samples: Sequence[Sample], labels: torch.Tensor) -> Pairs:
    """Return the preference pairs of some samples, whose `labels` `[B, T]` have been made."""
    rows = [sample.pieces or [] for sample in samples]
    none = sum(map(len, rows))
    replies, ends = (np.full(labels.shape, none) for _ in range(2))
    reply = 0
    for row, pieces in enumerate(rows):
        start = 0
        for length in pieces:
            # The last token is the end of a document, which is no input: the one before it has it as its label.
            replies[row, start : start + length - 1] = reply
            ends[row, start + length - 2] = reply
            start, reply = start + length, reply + 1
    lengths = np.bincount(replies[labels.numpy() != IGNORE_INDEX], minlength=none)[:none]
    numbers = np.concatenate([np.empty(0, np.int64), *(s.pairs for s in samples if s.pairs is not None)])
    replies, ends, numbers, lengths = (values.astype(np.int64) for values in (replies, ends, numbers, lengths))
    return Pairs(*map(torch.from_numpy, (replies, ends, numbers, lengths)), counted=len(numbers))


def _input_pieces(pieces: list[int], seq_len: int) -> list[int]:
    """Return how many of a row's T inputs each piece has: the last of T+1 ids is a label only; padding comes last."""
    total = sum(pieces)
    if total <= seq_len:
        return [*pieces, *([seq_len - total] if total < seq_len else [])]
    return [*pieces[:-1], *([pieces[-1] - 1] if pieces[-1] > 1 else [])]


def with_documents(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    end_of_document: int | None,
    reset_positions: bool = False,
    lengths: list[list[int]] | None = None,
) -> MicroBatch:
    """Return a micro-batch, with its documents if `end_of_document` is given. An end token belongs to its document.

    `lengths` are those of each row's documents, if they are known without their ends. With `reset_positions`, the
    positions begin at 0 in each document.
    """
    if end_of_document is None:
        return MicroBatch(tokens, labels)
    documents = Documents(lengths or (document_lengths(row, end_of_document) for row in tokens))
    return MicroBatch(tokens, labels, document_positions(documents) if reset_positions else None, documents)


def document_positions(documents: Documents) -> torch.Tensor:
    """Return each token's position in its document, from 0, int64 `[B, T]`."""
    lengths = np.concatenate([np.array(row) for row in documents.lengths])
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    return torch.from_numpy(positions).view(len(documents.lengths), -1)


def document_lengths(tokens: torch.Tensor, end_of_document: int) -> list[int]:
    """Return the lengths of the documents in `[T]` tokens on the host; the last one may have no end token."""
    after_ends = ((tokens == end_of_document).nonzero().flatten() + 1).tolist()
    bounds = [0, *after_ends] if after_ends[-1:] == [len(tokens)] else [0, *after_ends, len(tokens)]
    return [end - start for start, end in pairwise(bounds)]


def count_windows(dataset: Dataset, seq_len: int, limit: int | None = None) -> int:
    """Return how many windows of a split an evaluation reads: all, or the first `limit` of them."""
    whole = open_heldout(dataset, seq_len).num_readable
    return whole if limit is None else min(whole, limit)


def heldout_batches(
    dataset: Dataset,
    *,
    seq_len: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    max_samples: int | None = None,
    vocab_size: int | None = None,
    end_of_document: int | None = None,
    reset_positions: bool = False,
) -> Iterator[MicroBatch]:
    """Yield one rank's share of a split's windows in file order. Every rank gets the same number of batches.

    The last window may be partial. It and the last batch are padded with labels of `IGNORE_INDEX`. Over all ranks, each
    token except the split's first is a label exactly once; of conversations each token that counts. `max_samples`
    limits the number of windows; `end_of_document` and `reset_positions` are as in `micro_batch_of`.
    """
    windows = open_heldout(dataset, seq_len)
    num_windows = windows.num_readable if max_samples is None else min(windows.num_readable, max_samples)
    rows = micro_batch_size * dp_size
    for first in range(0, num_windows, rows):
        own = range(first + dp_rank * micro_batch_size, first + (dp_rank + 1) * micro_batch_size)
        nothing = Sample(np.empty(0, np.int64), pieces=[] if isinstance(windows, PackedSamples) else None)
        if isinstance(windows, PackedSamples) and windows.dataset.card.has_pairs:
            nothing = replace(nothing, pairs=np.empty(0, np.int64))
        samples = [windows.read(window, vocab_size) if window < num_windows else nothing for window in own]
        yield micro_batch_of(samples, padded_ids(samples, seq_len), end_of_document, reset_positions)

"""Build batches from sample numbers: a training stream with a prefetch thread, and held-out batches.

`order.py` decides the order of samples. A rank's share of a step depends only on (dp_rank, dp_size), so a step has the
same samples in every parallel layout.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch
import xxhash

from megatrain.data.batch import MicroBatch, StepBatch
from megatrain.data.dataset import Dataset
from megatrain.data.order import Order, merge_ranges, take
from megatrain.errors import DataError
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
    gives this rank's share of them. If `end_of_document` (the token that ends each document) is given, micro-batches
    know their documents. Errors in the thread, such as a `DataError` for a damaged block, are raised in the consumer.
    Call `close` when done.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        *,
        seq_len: int,
        vocab_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        batch_size: Callable[[int], int],
        first_step: int,
        cursor: int,
        skip_ranges: Iterable[tuple[int, int]] = (),
        end_of_document: int | None = None,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        assert order.seq_len == seq_len
        self._dataset, self._order = dataset, order
        self._vocab_size, self._micro_batch_size = vocab_size, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._batch_size, self._skip_ranges = batch_size, merge_ranges(skip_ranges)
        self._end_of_document = end_of_document
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
        windows = self._order.windows(own.reshape(-1))
        samples = np.stack([read_window(self._dataset, int(w), self._order.seq_len, self._vocab_size) for w in windows])
        hashes = np.array([sample_hash(ids) for ids in samples], dtype=np.uint64)
        micro_batches = [self._micro_batch(part) for part in samples.reshape(*own.shape, -1)]
        return StepBatch(micro_batches, hashes, size, cursor)

    def _micro_batch(self, samples: np.ndarray) -> MicroBatch:
        ids = torch.from_numpy(samples)
        micro_batch = with_documents(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), self._end_of_document)
        return micro_batch.pin_memory() if self._pin_memory else micro_batch


def with_documents(tokens: torch.Tensor, labels: torch.Tensor, end_of_document: int | None) -> MicroBatch:
    """Return a micro-batch, with its documents if `end_of_document` is given. An end token belongs to its document."""
    if end_of_document is None:
        return MicroBatch(tokens, labels)
    return MicroBatch(tokens, labels, documents=Documents(document_lengths(row, end_of_document) for row in tokens))


def document_lengths(tokens: torch.Tensor, end_of_document: int) -> list[int]:
    """Return the lengths of the documents in `[T]` tokens on the host; the last one may have no end token."""
    after_ends = ((tokens == end_of_document).nonzero().flatten() + 1).tolist()
    bounds = [0, *after_ends] if after_ends[-1:] == [len(tokens)] else [0, *after_ends, len(tokens)]
    return [end - start for start, end in pairwise(bounds)]


def read_window(dataset: Dataset, window: int, seq_len: int, vocab_size: int | None) -> np.ndarray:
    """Return the `seq_len + 1` ids (int64) from token `window * seq_len` on, or fewer at the end of the split.

    Raises `DataError` if an id is outside the vocabulary.
    """
    start = window * seq_len
    ids = dataset.read(start, min(seq_len + 1, dataset.num_tokens - start))
    if vocab_size is not None and len(ids) and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        at = int(np.argmax((ids >= vocab_size) | (ids < 0)))
        raise DataError(
            f"{dataset.name}: token id {int(ids[at])} at {dataset.place(start + at)} is outside the vocabulary "
            f"(0 to {vocab_size - 1}); model.vocab_size must be that of the tokenizer which made the data"
        )
    return ids


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
) -> Iterator[MicroBatch]:
    """Yield one rank's share of a split's windows in file order. Every rank gets the same number of batches.

    The last window may be partial. It and the last batch are padded with labels of `IGNORE_INDEX`. Over all ranks, each
    token except the split's first is a label exactly once. `max_samples` limits the number of windows;
    `end_of_document` is as in `TrainStream`.
    """
    num_windows = -(-(dataset.num_tokens - 1) // seq_len) if dataset.num_tokens else 0
    if max_samples is not None:
        num_windows = min(num_windows, max_samples)
    rows = micro_batch_size * dp_size
    for first in range(0, num_windows, rows):
        tokens = torch.zeros(micro_batch_size, seq_len, dtype=torch.int64)
        labels = torch.full((micro_batch_size, seq_len), IGNORE_INDEX, dtype=torch.int64)
        for row in range(micro_batch_size):
            window = first + dp_rank * micro_batch_size + row
            if window < num_windows:
                ids = torch.from_numpy(read_window(dataset, window, seq_len, vocab_size))
                tokens[row, : len(ids) - 1] = ids[:-1]
                labels[row, : len(ids) - 1] = ids[1:]
        yield with_documents(tokens, labels, end_of_document)

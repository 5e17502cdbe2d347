"""The stream and the held-out batches: every layout reads the same samples, resumes exactly, and carries errors."""

import threading
import time

import numpy as np
import pytest
import torch
import xxhash

from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import (
    TrainStream,
    document_lengths,
    heldout_batches,
    in_sample_order,
    sample_hash,
    samples_of_rank,
    step_hash,
)
from megatrain.data.order import SampleOrder
from megatrain.data.samples import Windows
from megatrain.errors import DataError
from megatrain.kernels import IGNORE_INDEX

T = 8


@pytest.fixture
def stream(train_set):
    """Make a `TrainStream` over 1,000 ids; close it at the end."""
    made = []

    def make(dataset=train_set, seed=7, **also):
        options = dict(vocab_size=1000, micro_batch_size=2, dp_rank=0, dp_size=1, first_step=1, cursor=0)
        options |= dict(batch_size=lambda step: 16, skip_ranges=[]) | also
        samples = Windows(dataset, T)
        order = SampleOrder(dataset.fingerprint, dataset.split, T, samples.num_samples, seed)
        made.append(TrainStream(samples, order, **options))
        return made[-1]

    yield make
    for item in made:
        assert item.close(), "the prefetch thread did not end"


def rows(batches):
    """Return the samples of one rank's step as T+1 ids, in micro-batch order."""
    found = []
    for micro in batches:
        assert (micro.tokens[:, 1:] == micro.labels[:, :-1]).all()
        found += [
            [*tokens, labels[-1]] for tokens, labels in zip(micro.tokens.tolist(), micro.labels.tolist(), strict=True)
        ]
    return found


def whole_step(make, step_index, dp_size, micro_batch_size, **also):
    """Return all samples of a step in sample order, assembled from its ranks by the documented rule."""
    size = None
    parts = []
    for rank in range(dp_size):
        one = make(dp_rank=rank, dp_size=dp_size, micro_batch_size=micro_batch_size, **also)
        for _ in range(step_index + 1):
            step = next(one)
        parts.append((rows(step.micro_batches), step.sample_hashes))
        size = step.batch_size
    samples, hashes = [None] * size, np.zeros(size, np.uint64)
    for j in range(size):
        micro, rank, row = j // (dp_size * micro_batch_size), (j // micro_batch_size) % dp_size, j % micro_batch_size
        place = micro * micro_batch_size + row
        samples[j], hashes[j] = parts[rank][0][place], parts[rank][1][place]
    return samples, step_hash(hashes), step.cursor


def test_a_sample_is_the_window_that_the_order_names(stream, train_set):
    order = SampleOrder(train_set.fingerprint, "train", T, 124, 7)
    ids = np.fromfile(train_set.bin_path, dtype=np.uint16).astype(int)
    step = next(stream())
    for k, sample in enumerate(rows(step.micro_batches)):
        window = int(order.windows(np.array([k]))[0])
        assert sample == ids[window * T : window * T + T + 1].tolist()
    assert step.cursor == 16 and step.batch_size == 16 and step.micro_batches[0].tokens.dtype.is_signed


@pytest.mark.parametrize("dp_size, micro_batch_size", [(1, 4), (1, 16), (2, 1), (2, 4), (4, 2), (8, 2)])
def test_every_layout_reads_the_same_samples_in_the_same_step(stream, dp_size, micro_batch_size):
    for step in (0, 8):  # step 8 runs over the end of the first epoch (124 samples)
        assert whole_step(stream, step, dp_size, micro_batch_size) == whole_step(stream, step, 1, 2)


@pytest.mark.parametrize("dp_size, micro_batch_size, num_micro_batches", [(1, 4, 3), (3, 1, 2), (4, 2, 1), (2, 3, 5)])
def test_the_batches_of_all_ranks_can_be_put_back_into_sample_order(dp_size, micro_batch_size, num_micro_batches):
    samples = 100 + np.arange(dp_size * micro_batch_size * num_micro_batches)
    shares = [samples_of_rank(samples, micro_batch_size, rank, dp_size) for rank in range(dp_size)]
    for j, sample in enumerate(samples):
        rank, micro_batch = (j // micro_batch_size) % dp_size, j // (dp_size * micro_batch_size)
        assert shares[rank][micro_batch, j % micro_batch_size] == sample
    by_rank = np.stack([share.reshape(-1) for share in shares])
    assert in_sample_order(by_rank, micro_batch_size).tolist() == samples.tolist()


def test_a_resumed_stream_continues_where_the_first_stopped(stream):
    first = stream()
    steps = [next(first) for _ in range(12)]
    assert [step.cursor for step in steps] == [16 * i for i in range(1, 13)]
    again = stream(first_step=6, cursor=steps[4].cursor)
    for step in steps[5:]:
        resumed = next(again)
        assert rows(resumed.micro_batches) == rows(step.micro_batches) and resumed.cursor == step.cursor


def test_skip_ranges_leave_out_exactly_their_samples(stream):
    plain = stream(batch_size=lambda step: 40)
    everything = rows(next(plain).micro_batches)
    skipping = stream(batch_size=lambda step: 6, skip_ranges=[(4, 10), (13, 14)])
    first, second = next(skipping), next(skipping)
    assert rows(first.micro_batches) == everything[:4] + everything[10:12] and first.cursor == 12
    assert rows(second.micro_batches) == everything[12:13] + everything[14:19] and second.cursor == 19


def test_the_batch_size_may_change_from_step_to_step(stream):
    ramp = stream(batch_size=lambda step: 2 * step, first_step=1)
    assert [next(ramp).cursor for _ in range(4)] == [2, 6, 12, 20]


def test_batch_hash_is_xxh3_over_samples_xxh3_in_little_endian():
    ids = np.array([[1, 2, 3], [4, 5, 70000]])
    singles = [xxhash.xxh3_64(row.astype("<i4").tobytes()) for row in ids]
    assert [sample_hash(row) for row in ids] == [single.intdigest() for single in singles]
    joined = b"".join(single.digest()[::-1] for single in singles)  # digest() is big-endian
    assert step_hash(np.array([sample_hash(row) for row in ids], np.uint64)) == xxhash.xxh3_64(joined).hexdigest()


def test_an_id_outside_the_vocabulary_is_named_with_file_and_offset(stream, train_set):
    at = int(np.flatnonzero(np.fromfile(train_set.bin_path, dtype=np.uint16) == 999)[0])
    bad = stream(vocab_size=999, batch_size=lambda step: 124)
    with pytest.raises(DataError) as error:
        next(bad)
    assert f"train.bin: token id 999 at byte {2 * at} is outside the vocabulary (0 to 998)" in str(error.value)


def test_a_negative_id_of_foreign_data_is_refused(stream, make_dataset):
    dataset = IndexedDataset.open(make_dataset("n", np.int32, train=[5] * 8 + [-3] + [5] * 8), "train")
    with pytest.raises(DataError, match="token id -3 at byte 32"):
        next(stream(dataset, batch_size=lambda step: 2))


def test_an_error_of_the_thread_is_raised_in_the_consumer_and_ends_the_stream(stream):
    def batch_size(step):
        if step == 3:
            raise OSError("the disk is gone")
        return 2

    broken = stream(batch_size=batch_size)
    next(broken), next(broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(broken)
    with pytest.raises(StopIteration):
        next(broken)


def test_the_stream_prefetches_no_further_than_configured(stream):
    asked = []
    ahead = stream(batch_size=lambda step: asked.append(step) or 2, prefetch=3)
    deadline = time.monotonic() + 5
    while len(asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert asked == [1, 2, 3, 4]  # three are in the queue, the thread holds the fourth
    assert next(ahead).cursor == 2


def test_close_ends_the_thread_even_while_its_queue_is_full(stream):
    before = threading.active_count()
    full = stream(prefetch=1)
    time.sleep(0.1)
    assert full.close(timeout_s=5) and threading.active_count() == before
    with pytest.raises(StopIteration):
        next(full)


@pytest.mark.parametrize(
    "tokens, dp_size, micro_batch_size", [(100, 1, 4), (101, 2, 3), (97, 4, 2), (9, 2, 1), (5, 2, 2), (2, 1, 1)]
)
def test_held_out_batches_score_each_token_once_and_are_equally_many_on_every_rank(
    make_dataset, tokens, dp_size, micro_batch_size
):
    ids = np.arange(tokens) + 10
    dataset = IndexedDataset.open(make_dataset(heldout=ids), "heldout")
    ranks = [
        list(heldout_batches(dataset, seq_len=T, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    scored = []
    for batches in ranks:
        for batch in batches:
            assert batch.tokens.shape == batch.labels.shape == (micro_batch_size, T)
            real = batch.labels != IGNORE_INDEX
            assert (batch.labels[real] == batch.tokens[real] + 1).all()
            scored += batch.labels[real].tolist()
    assert sorted(scored) == ids[1:].tolist()


def test_max_samples_bounds_the_held_out_windows(make_dataset):
    dataset = IndexedDataset.open(make_dataset(heldout=np.arange(100)), "heldout")
    batches = list(heldout_batches(dataset, seq_len=T, micro_batch_size=2, dp_rank=0, dp_size=1, max_samples=3))
    assert sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches) == 3 * T


def repeated(lengths):
    """The number of each token's document."""
    return [number for number, length in enumerate(lengths) for _ in range(length)]


def test_documents_are_separated_by_the_token_that_ends_them(stream):
    """The token that ends a document belongs to it, wherever it is in a window."""
    end = int(next(stream()).micro_batches[0].tokens[0, 3])
    batches = next(stream(end_of_document=end)).micro_batches
    assert len(batches[0].documents.lengths[0]) > 1
    for micro_batch in batches:
        for tokens, lengths in zip(micro_batch.tokens.tolist(), micro_batch.documents.lengths, strict=True):
            assert repeated(lengths) == [tokens[:place].count(end) for place in range(T)]
    assert next(stream()).micro_batches[0].documents is None


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [([1, 2, 3], [3]), ([1, 2, 7], [3]), ([7, 1, 2], [1, 2]), ([7, 7, 7], [1, 1, 1]), ([1, 7, 7], [2, 1])],
)
def test_a_document_ends_with_its_end_token_or_with_the_window(tokens, lengths):
    assert document_lengths(torch.tensor(tokens), 7) == lengths


def test_held_out_documents_are_separated_too(make_dataset):
    end = 7
    heldout = IndexedDataset.open(make_dataset(heldout=np.array([1, 2, 7, 3, 7, 7, 4, 5, 6, 7, 8, 9])), "heldout")
    options = dict(seq_len=T, micro_batch_size=2, dp_rank=0, dp_size=1)
    (batch,) = heldout_batches(heldout, **options, end_of_document=end)
    assert batch.documents.lengths == [[3, 2, 1, 2], [2, 6]]
    assert next(iter(heldout_batches(heldout, **options))).documents is None


def test_held_out_ids_outside_the_vocabulary_are_refused(make_dataset):
    dataset = IndexedDataset.open(make_dataset(heldout=np.arange(100)), "heldout")
    with pytest.raises(DataError, match=r"heldout.bin: token id 99 at byte 198"):
        list(heldout_batches(dataset, seq_len=T, micro_batch_size=2, dp_rank=0, dp_size=1, vocab_size=99))


def test_a_restarted_stream_equals_a_stream_that_begins_there(stream):
    """Prefetched batches are dropped, the new skip ranges apply, and the stream may go back."""
    moved = stream(batch_size=lambda step: 2 * (1 + step), micro_batch_size=2)
    for _ in range(5):
        next(moved)
    moved.restart(2, 4, [(8, 12)])
    begun = stream(
        batch_size=lambda step: 2 * (1 + step), micro_batch_size=2, first_step=2, cursor=4, skip_ranges=[(8, 12)]
    )
    for _ in range(3):
        mine, other = next(moved), next(begun)
        assert (mine.cursor, mine.batch_size) == (other.cursor, other.batch_size)
        assert mine.sample_hashes.tolist() == other.sample_hashes.tolist()


def test_a_thread_that_outlives_a_restart_changes_nothing(stream, train_set, monkeypatch):
    """The batch of a read that hangs on a slow disk and returns late is dropped."""
    moved, let_go, read = stream(), threading.Event(), TrainStream._read_step

    def slow(self, step, cursor, skip_ranges):
        if step == 50:
            let_go.wait(10)
        return read(self, step, cursor, skip_ranges)

    monkeypatch.setattr(TrainStream, "_read_step", slow)
    monkeypatch.setattr(TrainStream.close, "__defaults__", (0.05,))
    moved.restart(50, 0, [])
    stuck = moved._thread
    moved.restart(1, 0, [])
    let_go.set()
    stuck.join(10)
    assert not stuck.is_alive()
    assert [next(moved).cursor for _ in range(6)] == [16 * step for step in range(1, 7)]

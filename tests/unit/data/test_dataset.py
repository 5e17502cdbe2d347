"""The stream and held-out evaluation work with any `Dataset`, wherever its token ids are stored."""

import numpy as np
import pytest

from megatrain.data.dataset import Dataset
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import TrainStream, heldout_batches
from megatrain.data.order import SampleOrder
from megatrain.data.samples import Windows
from megatrain.errors import DataError


class Counting:
    """A dataset of the numbers from 0 on, computed instead of stored."""

    name = "counting"

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def read(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and start + count <= self.num_tokens
        return np.arange(start, start + count, dtype=np.int64)

    def counts(self, start, count):
        return None

    def place(self, token: int) -> str:
        return f"number {token}"

    def pause(self) -> None:
        pass


def stream(dataset: Dataset, vocab_size: int = 1000) -> TrainStream:
    order = SampleOrder("fingerprint", "train", 8, (dataset.num_tokens - 1) // 8, seed=7)
    sizes = dict(vocab_size=vocab_size, micro_batch_size=2, dp_rank=0, dp_size=1)
    return TrainStream(Windows(dataset, 8), order, **sizes, batch_size=lambda step: 4, first_step=1, cursor=0)


def test_a_stream_over_ids_in_memory_gives_the_batches_of_the_same_ids_on_disk(make_dataset):
    on_disk = IndexedDataset.open(make_dataset(train=np.arange(500)), "train")
    ours, theirs = stream(Counting(500)), stream(on_disk)
    for _ in range(3):
        ours_step, theirs_step = next(ours), next(theirs)
        assert (ours_step.sample_hashes == theirs_step.sample_hashes).all()
        for batch, same in zip(ours_step.micro_batches, theirs_step.micro_batches, strict=True):
            assert (batch.tokens == same.tokens).all() and (batch.labels == batch.tokens + 1).all()
    assert ours.close() and theirs.close()


def test_held_out_ids_in_memory_are_scored_like_the_same_ids_on_disk(make_dataset):
    on_disk = IndexedDataset.open(make_dataset(heldout=np.arange(100)), "heldout")
    sizes = dict(seq_len=8, micro_batch_size=3, dp_rank=0, dp_size=1)
    for batch, same in zip(heldout_batches(Counting(100), **sizes), heldout_batches(on_disk, **sizes), strict=True):
        assert (batch.tokens == same.tokens).all() and (batch.labels == same.labels).all()


def test_an_id_outside_the_vocabulary_is_reported_at_the_place_that_the_dataset_names():
    broken = stream(Counting(500), vocab_size=1)
    with pytest.raises(DataError, match=r"counting: token id \d+ at number \d+ is outside the vocabulary"):
        next(broken)
    assert broken.close()

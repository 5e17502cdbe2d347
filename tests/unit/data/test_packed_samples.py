"""Samples of whole documents: what they hold, their labels and positions, and the file that keeps the packing."""

import json
import os
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from megatrain.data import packing, packing_index
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.loader import TrainStream, in_sample_order, micro_batch_of, padded_ids, step_hash
from megatrain.data.order import SampleOrder
from megatrain.data.packing_index import open_packing, stored_packings, verify_packings
from megatrain.data.samples import PackedSamples, Sample, Windows, open_samples
from megatrain.errors import ConfigError, DataError
from megatrain.kernels import IGNORE_INDEX
from megatrain.resilience import atomic_file

T = 16
END = 0


def documents(count=200, seed=0, longest=60):
    """Documents of 1 to `longest` tokens whose ids say which they are; each ends with END."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    return [np.append(np.arange(length - 1) % 50 + 1 + 60 * (n % 100), END) for n, length in enumerate(lengths)]


@pytest.fixture
def packed(make_dataset):
    found = documents()
    dataset = IndexedDataset.open(make_dataset(train=found), "train")
    return found, open_samples(dataset, "best_fit", T, True)


def test_samples_hold_every_document_and_cut_none_that_fits(packed):
    found, samples = packed
    pieces = []
    for window in range(samples.num_samples):
        sample = samples.read(window, None)
        assert len(sample.ids) == sum(sample.pieces) <= T + 1
        pieces += [tuple(piece) for piece in np.split(sample.ids, np.cumsum(sample.pieces)[:-1])]
    expected = []
    for ids in found:
        last = max(0, len(ids) - 2) // T
        expected += [tuple(ids[T * n : T * n + T + 1]) for n in range(last + 1)]
    assert sorted(pieces) == sorted(expected)


def test_a_label_is_the_next_token_of_its_document_or_the_first_of_another(packed):
    """Of every document, all tokens but the first are labels once; the label after its end is a document's start."""
    found, samples = packed
    pairs = []
    for window in range(samples.num_samples):
        sample = samples.read(window, None)
        batch = micro_batch_of([sample], padded_ids([sample], T), None, False)
        kept = batch.labels[0] != IGNORE_INDEX
        pairs += list(zip(batch.tokens[0][kept].tolist(), batch.labels[0][kept].tolist(), strict=True))
    inside = [(a, b) for ids in found for a, b in zip(ids.tolist(), ids.tolist()[1:], strict=False)]
    starts = {int(ids[0]) for ids in found}
    across = [pair for pair in pairs if pair[0] == END]
    assert sorted(pair for pair in pairs if pair[0] != END) == sorted(inside)
    assert across and all(label in starts for _, label in across)


def test_the_last_labels_of_a_cut_piece_and_of_padding_do_not_count():
    sample = Sample(np.array([5, 6, 7, 8, 9]), [2, 2, 1], (1,))
    full = Sample(np.arange(1, 8), [3, 4])
    batch = micro_batch_of([sample, full], padded_ids([sample, full], 6), END, True)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0], [1, 2, 3, 4, 5, 6]]
    ignored = IGNORE_INDEX
    assert batch.labels.tolist() == [[6, ignored, 8, 9, ignored, ignored], [2, 3, 4, 5, 6, 7]]
    assert batch.documents.lengths == [[2, 2, 1, 1], [3, 3]]
    assert batch.positions.tolist() == [[0, 1, 0, 1, 0, 0], [0, 1, 2, 0, 1, 2]]


def test_a_last_piece_of_one_token_is_a_label_alone():
    sample = Sample(np.arange(1, 6), [4, 1])
    batch = micro_batch_of([sample], padded_ids([sample], 4), END, True)
    assert batch.documents.lengths == [[4]] and batch.labels.tolist() == [[2, 3, 4, 5]]


def test_positions_of_windows_begin_at_every_end_of_document():
    ids = np.array([[3, END, 4, 5, END, 6, 7]])
    batch = micro_batch_of([Sample(ids[0])], ids, END, True)
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert micro_batch_of([Sample(ids[0])], ids, END, False).positions is None


def hashes(samples, dp_size, micro_batch_size, steps=12, first_step=1, cursor=0):
    order = SampleOrder("f", "train", T, samples.num_samples, 3)
    by_rank = []
    for rank in range(dp_size):
        sizes = dict(micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp_size, batch_size=lambda step: 8)
        stream = TrainStream(samples, order, vocab_size=7000, first_step=first_step, cursor=cursor, **sizes)
        by_rank.append([next(stream) for _ in range(steps)])
        assert stream.close()
    return [
        step_hash(in_sample_order(np.stack([batch.sample_hashes for batch in batches]), micro_batch_size))
        for batches in zip(*by_rank, strict=True)
    ], by_rank[0][-1].cursor


def test_layouts_and_resumed_runs_read_the_same_packed_batches(packed):
    _, samples = packed
    whole, _ = hashes(samples, 1, 8, steps=samples.num_samples // 8 + 5)  # into the second epoch
    assert len(set(whole)) == len(whole)
    assert hashes(samples, 4, 1)[0] == hashes(samples, 2, 2)[0] == whole[:12]
    _, cursor = hashes(samples, 1, 4, steps=5)
    assert hashes(samples, 2, 4, steps=7, first_step=6, cursor=cursor)[0] == whole[5:12]


def test_the_order_is_not_that_of_the_lengths(packed):
    """Bins come sorted by their longest document; the samples of a run do not."""
    _, samples = packed
    longest = [max(samples.read(window, None).pieces) for window in range(samples.num_samples)]
    assert longest == sorted(longest, reverse=True)
    order = SampleOrder("f", "train", T, samples.num_samples, 3).windows(np.arange(samples.num_samples))
    assert abs(np.corrcoef(np.arange(len(longest)), np.array(longest)[order])[0, 1]) < 0.2


def test_the_figures_are_counted_right(packed):
    found, samples = packed
    card = samples.index.card
    assert card.documents == len(found) and card.cut == sum(len(ids) > T + 1 for ids in found)
    starts = np.cumsum([0, *(len(ids) for ids in found)])
    whole = [
        any(w * T <= start and start + len(ids) <= w * T + T + 1 for w in range(starts[-1] // T + 1))
        for start, ids in zip(starts, found, strict=False)
    ]
    assert card.cut_by_windows == whole.count(False) > card.cut
    held = [len(samples.read(window, None).ids) for window in range(samples.num_samples)]
    assert card.tokens == sum(held)
    assert card.figures["padding_share"] == pytest.approx(1 - sum(held) / (len(held) * (T + 1)), abs=1e-6)
    assert list(stored_packings(samples.dataset.folder)) == [card]


def test_blocks_of_documents_are_packed_apart_and_lose_nothing(make_dataset, monkeypatch):
    """Few documents at once, as happens in a dataset of more than four million pieces."""
    from megatrain.data import indexed_dataset

    monkeypatch.setattr(packing_index, "_AT_ONCE", 50)
    monkeypatch.setattr(indexed_dataset, "_STRIDE", 7)
    found = documents()
    samples = open_samples(IndexedDataset.open(make_dataset(train=found), "train"), "best_fit", T, True)
    read = [samples.read(window, None) for window in range(samples.num_samples)]
    ends = sum(int((sample.ids == END).sum()) for sample in read)
    assert ends == len(found) and max(len(sample.ids) for sample in read) <= T + 1


def test_very_long_documents_are_packed_in_parts_of_bounded_memory(make_dataset, monkeypatch):
    """Each has hundreds of pieces, so the documents that are read at once would have many thousands."""
    monkeypatch.setattr(packing_index, "_AT_ONCE", 1000)
    at_once = []

    def best_fit(lengths, capacity):
        at_once.append(len(lengths))
        return packing.best_fit(lengths, capacity)

    monkeypatch.setattr(packing_index, "best_fit", best_fit)
    long = [np.array([2] * (T * pieces) + [END]) for pieces in (300, 5, 400, 600, 1, 450, 700, 2, 100)]
    index = open_packing(IndexedDataset.open(make_dataset(train=long), "train"), T, True)
    assert index.card.documents == len(long) and index.card.pieces == sum(at_once) == 2558
    assert max(at_once) < 2 * 1000


def test_the_card_hashes_what_was_written_not_what_another_process_put_there(make_dataset, monkeypatch):
    folder = make_dataset(train=documents())
    replacing = atomic_file.replacing

    @contextmanager
    def replaced_at_once(path):
        with replacing(path) as file:
            yield file
        path.write_bytes(bytes(path.stat().st_size))

    monkeypatch.setattr(packing_index, "replacing", replaced_at_once)
    with pytest.raises(DataError, match="hash differs"):
        open_packing(IndexedDataset.open(folder, "train"), T, True).pieces(0)


def test_a_packing_is_computed_once_and_again_for_other_data(make_dataset, monkeypatch):
    folder = make_dataset(train=documents())
    dataset = IndexedDataset.open(folder, "train")
    card = open_packing(dataset, T, True).card
    made = []
    make = packing_index._make
    monkeypatch.setattr(packing_index, "_make", lambda *args: made.append(args[2]) or make(*args))
    open_packing(dataset, T, True)
    assert made == []
    open_packing(dataset, 2 * T, True)
    path = folder / "packing" / f"train_{T}.json"
    changes = ({"fingerprint": "another"}, {"format": 99}, {"samples": 2}, {"documents": 0}, {"tokens": None})
    for changed in (*changes, {"block_hashes": []}, {"checksum": "0"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        assert list(stored_packings(folder)) != [] and all(card.seq_len == 2 * T for card in stored_packings(folder))
        assert open_packing(dataset, T, True).card == card
    (folder / "packing" / f"train_{T}.bin").write_bytes(b"cut short")
    open_packing(dataset, T, True)
    for damaged in ("{", "[]", "null", "1"):
        path.write_text(damaged)
        assert open_packing(dataset, T, True).card == open_packing(dataset, T, False).card == card
    assert made == [2 * T, *[T] * 12]


def test_a_changed_packing_is_refused(packed):
    _, samples = packed
    path = samples.dataset.folder / "packing" / f"train_{T}.bin"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train_16.bin: does not match"):
        verify_packings(samples.dataset.folder)
    with pytest.raises(DataError, match=r"train_16.bin: bytes 0 to .*hash differs.*remove the folder .*packing"):
        open_samples(samples.dataset, "best_fit", T, True).read(0, None)


def test_a_changed_index_of_the_dataset_is_refused(make_dataset):
    folder = make_dataset(train=documents())
    with (folder / "train.idx").open("r+b") as file:
        file.seek(40)
        file.write(b"\7")
    with pytest.raises(DataError, match=r"train\.idx"):
        open_samples(IndexedDataset.open(folder, "train"), "best_fit", T, True)
    assert not list((folder / "packing").iterdir())


def test_a_folder_that_cannot_be_written_to_is_packed_at_each_start(make_dataset, monkeypatch, caplog):
    """As root, permissions stop nobody, so the refusal is simulated."""
    folder = make_dataset(train=documents())
    dataset = IndexedDataset.open(folder, "train")

    def refuse(self, *args, **named):
        raise PermissionError(13, "Permission denied", str(self))

    made = []
    make = packing_index._make
    monkeypatch.setattr(packing_index, "_make", lambda *args: made.append(args[2]) or make(*args))
    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "mkdir", refuse)
        indexes = [open_packing(dataset, T, True) for _ in range(2)]
    for index in indexes:
        samples = PackedSamples(dataset, index)
        assert sum(int((samples.read(w, None).ids == END).sum()) for w in range(samples.num_samples)) == 200
    assert made == [T]  # once, though a mixture opens it twice: to count its samples, and to read them
    assert f"nothing can be written to {folder} (Permission denied), so each start packs anew" in caplog.text
    assert not (folder / "packing").exists()


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(make_dataset):
    folder = make_dataset(train=documents())
    (folder / "packing").mkdir()
    left, written = (folder / "packing" / f".train_{T}.bin.{n:012x}.{n}.00000000.writing" for n in (7, 8))
    for file in (left, written):
        file.write_bytes(b"pieces")
    os.utime(left, (0, time.time() - 25 * 3600))
    open_packing(IndexedDataset.open(folder, "train"), T, True)
    assert not left.exists() and written.exists()


@pytest.mark.parametrize("link", [False, True])
def test_what_stands_where_packings_are_kept_is_named(make_dataset, link):
    folder = make_dataset(train=documents())
    place = folder / "packing"
    place.symlink_to(folder / "gone") if link else place.write_text("")
    with pytest.raises(ConfigError, match=r"data.packing=best_fit: .*/packing is no folder, .*; remove it"):
        open_packing(IndexedDataset.open(folder, "train"), T, True)


def test_without_packing_the_samples_are_windows(packed):
    _, samples = packed
    windows = open_samples(samples.dataset, "concatenate", T, True)
    assert isinstance(windows, Windows) and windows.num_samples == (samples.dataset.num_tokens - 1) // T
    assert torch.equal(torch.tensor(windows.read(3, None).ids), torch.tensor(samples.dataset.read(3 * T, T + 1)))

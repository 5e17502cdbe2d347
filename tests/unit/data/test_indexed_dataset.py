"""A dataset's sizes are checked when it is opened, its hashes on first read, and all of it by `verify_dataset`."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from megatrain.data import indexed, indexed_dataset, verified_file
from megatrain.data.adopt import make_card
from megatrain.data.card import Card, check_dataset
from megatrain.data.indexed_dataset import IndexedDataset, verify_dataset
from megatrain.errors import ConfigError, DataError


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 256 bytes instead of 64 MiB."""
    monkeypatch.setattr(indexed, "BLOCK_BYTES", 256)
    monkeypatch.setattr(indexed_dataset, "BLOCK_BYTES", 256)
    monkeypatch.setattr(verified_file, "BLOCK_BYTES", 256)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_reads_return_the_ids_that_were_written(make_dataset, small_blocks):
    ids = np.random.default_rng(0).integers(0, 60000, 1000)
    dataset = IndexedDataset.open(make_dataset(train=ids), "train")
    for start, count in [(0, 1), (0, 1000), (127, 2), (999, 1), (500, 0), (1000, 0)]:
        got = dataset.read(start, count)
        assert got.dtype == np.int64 and np.array_equal(got, ids[start : start + count])


def test_a_changed_block_is_found_when_it_is_first_read_and_not_before(make_dataset, small_blocks):
    folder = make_dataset(train=np.arange(1000))
    flip(folder / "train.bin", 600)  # block 2: bytes 512 to 768, tokens 256 to 384
    dataset = IndexedDataset.open(folder, "train")
    assert np.array_equal(dataset.read(0, 256), np.arange(256))
    assert np.array_equal(dataset.read(384, 616), np.arange(384, 1000))
    for start, count in [(255, 2), (383, 1), (300, 1)]:
        with pytest.raises(DataError) as error:
            dataset.read(start, count)
        assert "train.bin: bytes 512 to 768" in str(error.value)


def test_without_verification_a_changed_block_is_read(make_dataset):
    folder = make_dataset(train=np.arange(1000))
    flip(folder / "train.bin", 600)
    assert IndexedDataset.open(folder, "train", verify=False).read(300, 1)[0] == 301


def test_each_document_comes_back_with_its_own_ids(tmp_path):
    writer = indexed.IndexedWriter(tmp_path / "train", np.dtype(np.uint16))
    writer.add(np.array([1, 2, 3, 9, 4, 9], np.uint16), np.array([4, 2], np.int32))
    writer.finish()
    make_card(tmp_path, "x", None).save(tmp_path)
    assert [ids.tolist() for ids in IndexedDataset.open(tmp_path, "train").documents()] == [[1, 2, 3, 9], [4, 9]]


def write_in_place(path, data):
    path.write_bytes(data)


def replace_file(path, data):
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


def write_and_restore_times(path, data):
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [write_in_place, replace_file, write_and_restore_times])
def test_a_file_that_changes_while_it_is_open_is_verified_again(make_dataset, small_blocks, monkeypatch, change):
    """Even if it is replaced or its times are restored: unchanged blocks are read, changed blocks are refused."""
    monkeypatch.setattr(verified_file, "_SETTLE_S", 0.01)
    folder = make_dataset(train=np.arange(1000))
    dataset = IndexedDataset.open(folder, "train")
    assert np.array_equal(dataset.read(0, 1000), np.arange(1000))
    data = bytearray((folder / "train.bin").read_bytes())
    data[600] ^= 1
    change(folder / "train.bin", bytes(data))
    assert np.array_equal(dataset.read(0, 256), np.arange(256))
    with pytest.raises(DataError, match=r"train\.bin: bytes 512 to 768"):
        dataset.read(300, 1)


def test_the_error_about_a_file_truncated_while_open_says_where_it_ends(make_dataset, small_blocks, monkeypatch):
    """With and without hashes. Reading through a memory map would kill the process instead."""
    monkeypatch.setattr(verified_file, "_SETTLE_S", 0.01)
    folder = make_dataset(train=np.arange(1000))
    for verify in (True, False):
        dataset = IndexedDataset.open(folder, "train", verify)
        assert dataset.read(500, 1)[0] == 500
        os.truncate(folder / "train.bin", 700)
        with pytest.raises(
            DataError, match=r"train\.bin: bytes 1000 to 1002 cannot be read: it ends at byte 700, but the"
        ):
            dataset.read(500, 1)
        (folder / "train.bin").write_bytes(np.arange(1000, dtype=np.uint16).tobytes())
    assert IndexedDataset.open(folder, "train").read(500, 1)[0] == 500
    dataset = IndexedDataset.open(folder, "train")
    (folder / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin: is gone"):
        dataset.read(500, 1)


def test_reading_a_file_that_keeps_changing_gives_up(make_dataset, monkeypatch):
    folder = make_dataset(train=np.arange(1000))
    dataset = IndexedDataset.open(folder, "train")
    monkeypatch.setattr(verified_file.time, "sleep", lambda seconds: os.utime(folder / "train.bin"))  # type: ignore[attr-defined]
    monkeypatch.setattr(dataset._file, "_stamp", iter([(number,) for number in range(99)]).__next__)
    with pytest.raises(DataError, match="is being written to"):
        dataset.read(0, 1)


def cut(name, by):
    def apply(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-by] if by > 0 else data + bytes(-by))

    return apply


def edit(change):
    def apply(folder):
        card = json.loads((folder / "card.json").read_text())
        change(card)
        (folder / "card.json").write_text(json.dumps(card))

    return apply


@pytest.mark.parametrize(
    "change, message",
    [
        (cut("train.bin", 2), "train.bin: 18 bytes, shorter than the 20 bytes its .idx says"),
        (cut("train.bin", -2), "train.bin: 22 bytes, but the card says 20"),
        (cut("train.idx", 1), "train.idx: "),
        (lambda folder: (folder / "train.bin").unlink(), "train.bin: no such file"),
        (cut("card.json", 40), "card.json: not a dataset card"),
        (edit(lambda card: card.update(fingerprint="0" * 32)), "its fingerprint does not match its own hashes"),
        (
            edit(lambda card: card["splits"]["train"].update(idx_hash="0" * 32)),
            "its fingerprint does not match its own hashes",
        ),
        (edit(lambda card: card.update(format=99)), "card format 99"),
        (lambda folder: (folder / "card.json").write_text("[" * 200000), "card.json: not a dataset card"),
        (
            edit(lambda card: card["splits"]["train"].update(tokens="10")),
            "card.json: not a dataset card (tokens is '10')",
        ),
        (edit(lambda card: card["splits"]["train"].update(bytes="x")), "not a dataset card (bytes is 'x')"),
        (edit(lambda card: card["splits"]["train"].update(tokens=-1)), "not a dataset card (tokens is -1)"),
        (edit(lambda card: card["splits"]["train"].update(dtype="foo")), "but the card says 10 foo"),
    ],
)
def test_an_incomplete_dataset_is_refused_before_it_is_read(make_dataset, change, message):
    folder = make_dataset(train=np.arange(10))
    change(folder)
    for check in (check_dataset, lambda f: IndexedDataset.open(f, "train"), verify_dataset):
        with pytest.raises(DataError) as error:
            check(folder)
        assert message in str(error.value)


def test_a_missing_file_is_named_with_its_remedy(make_dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"no dataset at .*none; make it with: megatrain prepare"):
        check_dataset(tmp_path / "none")
    folder = make_dataset(train=np.arange(10))
    with pytest.raises(DataError, match=r"has no heldout split; prepare it with data.heldout_fraction above 0"):
        IndexedDataset.open(folder, "heldout")
    (folder / "card.json").unlink()
    with pytest.raises(ConfigError, match=r"has .bin/.idx pairs \(train\) but no card.json.*data=megatron"):
        check_dataset(folder)
    (folder / "train.idx").unlink()
    with pytest.raises(ConfigError, match=r"is not a prepared dataset"):
        check_dataset(folder)


def test_the_fingerprint_covers_the_ids_the_index_and_the_splits(make_dataset, tmp_path):
    prints = [
        Card.load(make_dataset(name, **splits)).fingerprint
        for name, splits in {
            "a": dict(train=[1, 2, 3]),
            "b": dict(train=[1, 2, 4]),
            "c": dict(train=[1, 2, 3, 0]),
            "d": dict(heldout=[1, 2, 3]),
            "e": dict(train=[1, 2, 3], heldout=[1]),
            "f": dict(train=[1, 2, 3], dtype=np.int32),
        }.items()
    ]
    writer = indexed.IndexedWriter(tmp_path / "train", np.dtype(np.uint16))
    writer.add(np.array([1, 2, 3], np.uint16), np.array([1, 2], np.int32))  # the ids of "a" as two documents
    writer.finish()
    prints.append(make_card(tmp_path, "g", None).fingerprint)
    assert len(set(prints)) == 7
    assert Card.load(make_dataset("again", train=[1, 2, 3])).fingerprint == prints[0]


@pytest.mark.parametrize(
    "name, at, message",
    [("train.bin", 900, "train.bin: block at byte 768"), ("train.idx", 47, "train.idx: its hash does not match")],
)
def test_inspecting_finds_a_single_flipped_bit_anywhere(make_dataset, small_blocks, name, at, message):
    folder = make_dataset(train=np.arange(1000))
    verify_dataset(folder)
    split = Card.load(folder).splits["train"]
    assert (split.documents, split.bytes, split.tokens, split.dtype) == (1, 3000, 1000, "uint16")
    flip(folder / name, at)
    with pytest.raises(DataError, match=message):
        verify_dataset(folder)


def test_inspecting_compares_the_cards_tokenizer_with_the_one_in_the_folder(make_dataset, monkeypatch):
    folder = make_dataset(train=np.arange(10))
    said = {"fingerprint": "f", "vocab_size": 300, "end_of_document": 0}
    edit(lambda card: card.update(tokenizer={"kind": "hf", **said}))(folder)
    monkeypatch.setattr("megatrain.data.tokenizer_loading.load_tokenizer", lambda place: SimpleNamespace(**said))
    verify_dataset(folder)
    edit(lambda card: card["tokenizer"].update(vocab_size=100))(folder)
    with pytest.raises(DataError, match="its vocab_size is 300, the card's 100"):
        verify_dataset(folder)


def test_the_card_of_foreign_files_equals_the_card_of_their_writer(make_dataset):
    folder = make_dataset(train=np.arange(100), heldout=[5, 6])
    made = make_card(folder, "x", None)
    written = Card.load(folder)
    assert made.fingerprint == written.fingerprint
    assert made.splits["train"].block_hashes == written.splits["train"].block_hashes
    assert made.splits["train"].bytes is None


def test_checking_a_dataset_imports_no_torch(make_dataset):
    folder = make_dataset(train=np.arange(100))
    code = (
        "import sys; from pathlib import Path; from megatrain.data.card import check_dataset;"
        "from megatrain.data import indexed_dataset, order, preparation; check_dataset(Path(sys.argv[1]));"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_split_without_tokens_is_refused_by_name(make_dataset):
    folder = make_dataset(train=np.arange(10), heldout=np.arange(0))
    with pytest.raises(DataError, match="its heldout split is empty"):
        IndexedDataset.open(folder, "heldout")

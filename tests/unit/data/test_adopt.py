"""Adopted Megatron data: many pairs are one dataset with one order, and a pair that was moved is named."""

import json

import numpy as np
import pytest

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data import indexed_dataset
from megatrain.data.card import Card, check_dataset
from megatrain.data.indexed import IndexedWriter
from megatrain.data.indexed_dataset import IndexedDataset, verify_dataset
from megatrain.data.loader import heldout_batches
from megatrain.data.order import SampleOrder
from megatrain.data.preparation import prepare
from megatrain.errors import ConfigError, DataError

SIZES = [300, 1, 0, 450, 7, 242]  # tokens of each pair


@pytest.fixture
def shards(tmp_path):
    """Write ids 0 to 999 in six pairs of two dtypes, each in documents of at most 50 ids; return their folder."""
    folder, start = tmp_path / "shards", 0
    folder.mkdir()
    for at, size in enumerate(SIZES):
        writer = IndexedWriter(folder / f"s.{at}_document", np.dtype(np.int32 if at % 2 else np.uint16))
        lengths = [50] * (size // 50) + [size % 50]
        writer.add(np.arange(start, start + size, dtype=writer.dtype), np.array(lengths, np.int32))
        writer.finish()
        start += size
    return folder


def adopt(tmp_path, paths, name="d", **also):
    named = [str(path) for path in paths]
    data = DataConfig(name=name, dir=str(tmp_path / "out"), kind="megatron", paths=named, **also)
    return prepare(PrepareConfig(data=data, tokenizer=TokenizerConfig()))


def prefixes(shards):
    return [shards / f"s.{at}_document" for at in range(len(SIZES))]


def listed(shards, lines, name="list.txt"):
    (shards / name).write_text("\n".join(map(str, lines)))
    return [shards / name]


WAYS = {
    "list": prefixes,
    "glob": lambda shards: [shards / "s.?_document"],
    "glob of files": lambda shards: [shards / "*.bin"],
    "folder": lambda shards: [shards],
    "file": lambda shards: listed(shards, ["# ours", *prefixes(shards), ""]),
    "file of names": lambda shards: listed(shards, [f"{path.name}.idx" for path in prefixes(shards)]),
    "file with a glob": lambda shards: listed(shards, ["s.[0-2]_document", "s.[3-5]_document"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_many_pairs_are_one_dataset_whichever_way_they_are_named(tmp_path, shards, way):
    folder = adopt(tmp_path, WAYS[way](shards))
    card = Card.load(folder)
    assert list(card.splits) == ["train"] and card.splits["train"].tokens == sum(SIZES) == 1000
    assert card.fingerprint == Card.load(adopt(tmp_path, prefixes(shards), name="again")).fingerprint
    dataset = IndexedDataset.open(folder, "train")
    assert np.array_equal(dataset.read(0, 1000), np.arange(1000)) and dataset.num_tokens == 1000
    verify_dataset(folder)
    assert adopt(tmp_path, WAYS[way](shards)) == folder, "preparing again finds it"


@pytest.mark.parametrize("most_open", [1, 2, 64])
def test_windows_across_pairs_hold_the_ids_of_the_whole(tmp_path, shards, monkeypatch, most_open):
    monkeypatch.setattr(indexed_dataset, "_MAX_OPEN", most_open)
    folder = adopt(tmp_path, prefixes(shards))
    dataset = IndexedDataset.open(folder, "train")
    order = SampleOrder(dataset.fingerprint, "train", 64, (dataset.num_tokens - 1) // 64, seed=1)
    for window in order.windows(np.arange(30)):
        assert np.array_equal(dataset.read(int(window) * 64, 65), np.arange(int(window) * 64, int(window) * 64 + 65))
    documents = [(ids, dataset.read(999, 1)) for ids in dataset.documents()]  # a read in between closes a pair
    assert np.array_equal(np.concatenate([ids for ids, _ in documents]), np.arange(1000))
    batches = list(heldout_batches(dataset, seq_len=64, micro_batch_size=4, dp_rank=0, dp_size=1))
    assert int(sum((batch.labels >= 0).sum() for batch in batches)) == 999
    assert dataset.place(301).startswith("byte 0 of ") and "train_00003.bin" in dataset.place(301)
    assert dataset.place(300).endswith("train_00001.bin") and dataset.read(1000, 0).size == 0


def test_the_order_of_the_pairs_is_part_of_the_datasets_identity(tmp_path, shards):
    forward, backward = prefixes(shards), prefixes(shards)[::-1]
    first, second = (adopt(tmp_path, paths, name) for name, paths in (("f", forward), ("b", backward)))
    assert Card.load(first).fingerprint != Card.load(second).fingerprint
    assert IndexedDataset.open(second, "train").read(0, 1)[0] == 758
    with pytest.raises(ConfigError, match=r"data.name: .* was prepared with other settings: .*source.train"):
        adopt(tmp_path, backward, "f")


def test_one_or_two_paths_mean_what_they_always_meant(tmp_path, shards):
    """The second is the held-out split; either may be a glob. The files of a single pair are named as before."""
    folder = adopt(tmp_path, [shards / "s.0_document", shards / "s.[35]_document"])
    card = Card.load(folder)
    assert card.splits["train"].tokens == 300 and card.splits["heldout"].tokens == 692
    assert (folder / "train.bin").is_symlink() and (folder / "heldout_00001.bin").is_symlink()
    assert np.array_equal(IndexedDataset.open(folder, "heldout").read(440, 20), [*range(741, 751), *range(758, 768)])
    raw = json.loads((folder / "card.json").read_text())
    assert "parts" not in raw["splits"]["train"] and raw["source"]["train"] == str(shards / "s.0_document")
    single = Card.load(adopt(tmp_path, [shards / "s.0_document"], "one"))
    assert single.fingerprint == "fdca57cd36be6f85ddaaa97dce3fa60c"


def test_damage_in_any_pair_is_found(tmp_path, shards):
    folder = adopt(tmp_path, prefixes(shards))
    with open(shards / "s.3_document.bin", "r+b") as file:
        file.write(b"\xff")
    dataset = IndexedDataset.open(folder, "train")
    assert np.array_equal(dataset.read(0, 300), np.arange(300))
    for read in (lambda: dataset.read(299, 9), lambda: verify_dataset(folder)):
        with pytest.raises(DataError, match=r"train_00003.bin"):
            read()
    with open(shards / "s.5_document.bin", "ab") as file:
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(DataError, match=r"train_00005.bin: .* the card says"):
        check_dataset(folder)


@pytest.mark.parametrize(
    "lines, message",
    [
        (["0.5 s.0_document"], r"list.txt: '0.5 s.0_document' gives a weight"),
        (["# nothing"], r"list.txt names no prefix"),
        (["s.0_document", "s.0_document"], r"s.0_document is named more than once"),
        (["s.9_document"], r"there is no .*shards/s.9_document.bin and .idx"),
    ],
)
def test_a_list_that_cannot_be_followed_is_refused(tmp_path, shards, lines, message):
    with pytest.raises(ConfigError, match=rf"data.paths: .*{message}"):
        adopt(tmp_path, listed(shards, lines))
    (tmp_path / "empty").mkdir()
    for paths, error in (([tmp_path / "empty"], "the folder .* has no .idx"), ([], "such as .corpus_text_document")):
        with pytest.raises(ConfigError, match=error):
            adopt(tmp_path, paths)


def test_a_pair_that_was_moved_is_named_with_its_old_place_and_the_remedy(tmp_path, shards):
    folder = adopt(tmp_path, [shards / "s.0_document"])
    fingerprint = Card.load(folder).fingerprint
    shards.rename(tmp_path / "moved")
    for check in (check_dataset, verify_dataset, lambda place: IndexedDataset.open(place, "train")):
        with pytest.raises(DataError, match=r"train.bin: links to .*shards/s.0_document.bin, which is not there.*over"):
            check(folder)
    adopt(tmp_path, [tmp_path / "moved" / "s.0_document"], overwrite=True)
    assert check_dataset(folder).fingerprint == fingerprint


@pytest.mark.parametrize("missing", [".bin", ".idx"])
@pytest.mark.parametrize("way", ["glob", "glob of files", "folder", "file with a glob"])
def test_a_file_without_its_partner_is_refused_and_no_shard_is_lost(tmp_path, shards, way, missing):
    (shards / f"s.3_document{missing}").unlink()
    present = {".bin": ".idx", ".idx": ".bin"}[missing]
    message = rf"s.3_document{missing}: no such file, but .*s.3_document{present} is there"
    with pytest.raises(DataError, match=message):
        adopt(tmp_path, WAYS[way](shards))


@pytest.mark.parametrize("way", ["same", "spelling", "symlink", "folder link", "hard link", "in a folder"])
def test_held_out_data_that_is_training_data_is_refused(tmp_path, shards, way):
    train = heldout = shards / "s.0_document"
    other = tmp_path / "other"
    if way == "spelling":
        heldout = shards / ".." / "shards" / "s.0_document"
    elif way == "folder link":
        other.symlink_to(shards)
        heldout = other / "s.0_document"
    elif "link" in way:
        other.mkdir()
        heldout = other / "mine"
        for suffix in (".bin", ".idx"):
            source, target = shards / f"s.0_document{suffix}", other / f"mine{suffix}"
            target.symlink_to(source) if way == "symlink" else target.hardlink_to(source)
    elif way == "in a folder":
        train = shards
    with pytest.raises(ConfigError, match=r"data.paths: the held-out .*\.bin is .*s.0_document.bin of the train split"):
        adopt(tmp_path, [train, heldout])
    assert not (tmp_path / "out").exists()


def test_a_list_of_prefixes_may_begin_with_a_byte_order_mark(tmp_path, shards):
    (shards / "list.txt").write_text("s.0_document\ns.3_document\n", encoding="utf-8-sig")
    assert Card.load(adopt(tmp_path, [shards / "list.txt"])).splits["train"].tokens == 750


@pytest.mark.parametrize("among", [False, True])
def test_a_copy_of_training_data_is_refused_as_held_out_data(tmp_path, shards, among):
    """A copy has another name, inode and `.idx` of other documents; only the token ids tell."""
    other = tmp_path / "other"
    other.mkdir()
    writer = IndexedWriter(other / "copy", np.dtype(np.uint16))
    writer.add(np.arange(300, dtype=np.uint16), np.array([100, 200], np.int32))
    writer.finish()
    message = r"data.paths: the held-out .*copy.bin has the same contents as .*s.0_document.bin of the train split"
    with pytest.raises(ConfigError, match=message):
        adopt(tmp_path, [shards if among else shards / "s.0_document", other])
    assert not (tmp_path / "out" / "d").exists()
    adopt(tmp_path, [shards / "s.3_document", other])


@pytest.mark.parametrize("folder", ["", ".", "./", "/"])
def test_a_folder_without_a_name_is_a_folder_like_any_other(tmp_path, shards, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.paths: the folder [./] has no \.idx"):
        adopt(tmp_path, [folder])
    if folder != "/":
        monkeypatch.chdir(shards)
        adopt(tmp_path, [folder])


def test_conversations_are_not_adopted_without_what_counts_in_their_loss(tmp_path, shards):
    ids = np.arange(10, dtype=np.uint16)
    with IndexedWriter(shards / "talks", ids.dtype) as writer:
        writer.add(ids, np.array([10], np.int32), np.ones(10, np.uint8))
        writer.finish()
    with pytest.raises(ConfigError, match=r"talks has conversations, and talks\.loss says"):
        adopt(tmp_path, [shards / "talks"])
    assert not (tmp_path / "out" / "d").exists()
    (shards / "talks.loss").unlink()
    assert adopt(tmp_path, [shards / "talks"]).is_dir()

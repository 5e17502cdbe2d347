"""Preparing keeps every text exactly once, gives the same bytes on any number of workers, and is all or nothing."""

import gzip
import json
import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.corpus.cleaned import CleanedShardWriter, describe, pack
from megatrain.data.corpus.selection import DROPPED, TRAIN, Selection
from megatrain.data.corpus.worker_pool import Workers
from megatrain.data.indexed_dataset import IndexedDataset, verify_dataset
from megatrain.data.preparation import prepare
from megatrain.data.preparation_summary import format_counts
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import ConfigError, DataError, OwnedError


def config(tmp_path, data=None, tokenizer=None, seed=1234):
    given = dict(name="d", dir=str(tmp_path / "out"), kind="files", paths=[str(tmp_path / "in" / "*")], workers=1)
    return PrepareConfig(
        seed, DataConfig(**given | (data or {})), TokenizerConfig(**{"vocab_size": 400} | (tokenizer or {}))
    )


def make(tmp_path, **also):
    return prepare(config(tmp_path, **also))


def documents(folder, split):
    """Return the texts of a split, decoded from its ids."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    texts = []
    for ids in IndexedDataset.open(folder, split).documents():
        assert ids[-1] == tokenizer.end_of_document and tokenizer.end_of_document not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1].tolist()))
    return texts


def texts(count, start=0):
    return [
        f"Document {i}\twith  spaces ▁ and é {'x' * (i % 37)}\n    indented {i * i}\n"
        for i in range(start, start + count)
    ]


def lines(of):
    return "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in of)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Write 300 documents over every file format, read in chunks of at most 16; return their texts."""
    monkeypatch.setattr("megatrain.data.corpus.pipeline.CHUNK_RECORDS", 16)
    (tmp_path / "in").mkdir()
    all_texts = texts(300)
    (tmp_path / "in" / "a.jsonl").write_text(lines(all_texts[:60]) + "\n  \n")
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(lines(all_texts[60:120]).encode()))
    two = [zstandard.compress(lines(part).encode()) for part in (all_texts[120:150], all_texts[150:180])]
    (tmp_path / "in" / "c.jsonl.zst").write_bytes(b"".join(two))
    table = pyarrow.table({"text": all_texts[180:240], "other": list(range(60))})
    pyarrow.parquet.write_table(table, tmp_path / "in" / "d.parquet", row_group_size=7)
    for i in range(240, 300):
        (tmp_path / "in" / f"e{i}.{'txt' if i % 2 else 'md'}").write_bytes(all_texts[i].encode())
    return all_texts


def test_every_format_gives_its_documents_once_and_exactly(tmp_path, corpus):
    folder = make(tmp_path)
    train, heldout = documents(folder, "train"), documents(folder, "heldout")
    assert sorted(train + heldout) == sorted(corpus)
    assert train == [text for text in corpus if text in set(train)], "the order of the corpus is kept"
    card = Card.load(folder)
    assert card.splits["train"].documents == len(train) and card.splits["heldout"].documents == len(heldout)
    assert card.splits["train"].bytes == sum(len(text.encode()) for text in train)
    assert card.counts["read"] == 300 and card.source["files"] == 64


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, corpus):
    folders = [make(tmp_path, data=dict(name=f"w{n}", workers=n)) for n in (1, 3)]
    for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx", "tokenizer/tokenizer.model"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_text_is_normalised(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes("\ufeffe\u0301\r\nb\x00\x1b\rc".encode())
    folder = make(tmp_path, data=dict(heldout_fraction=0.0))
    assert documents(folder, "train") == ["\u00e9\nb\nc"]
    assert unicodedata.is_normalized("NFC", documents(folder, "train")[0])


def test_duplicates_are_dropped_after_normalising_and_counted(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines([*texts(40), *texts(40), texts(1)[0].replace("\n", "\r\n"), ""]))
    folder = make(tmp_path)
    assert sorted(documents(folder, "train") + documents(folder, "heldout")) == sorted(texts(40))
    assert Card.load(folder).counts == dict(
        read=82,
        kind_json=82,
        left_out=0,
        duplicates=41,
        empty=1,
        oversized=0,
        bad=0,
        undecodable=0,
        skipped_undecodable=0,
    )
    both = make(tmp_path, data=dict(name="kept", deduplicate=False))
    assert len(documents(both, "train") + documents(both, "heldout")) == 81


def test_the_held_out_documents_do_not_depend_on_the_order_of_reading(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.jsonl"
    held = []
    for name, order in {"forward": texts(400), "backward": texts(400)[::-1], "fewer": texts(300)}.items():
        path.write_text(lines(order))
        held.append(set(documents(make(tmp_path, data=dict(name=name, heldout_fraction=0.1)), "heldout")))
    assert held[0] == held[1] and held[2] == held[0] & set(texts(300))
    assert 20 <= len(held[0]) <= 65
    other = make(tmp_path, data=dict(name="seed", heldout_fraction=0.1), seed=5)
    assert set(documents(other, "heldout")) != held[2]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_a_small_corpus_gets_something_to_train_on_and_something_held_out(tmp_path, count, fraction):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines(texts(count)))
    folder = make(tmp_path, data=dict(heldout_fraction=fraction))
    train, heldout = documents(folder, "train"), documents(folder, "heldout")
    assert train and heldout and sorted("".join(train + heldout)) == sorted("".join(texts(count)))
    if count > 1:
        assert min(len(train), len(heldout)) == 1 and sorted(train + heldout) == sorted(texts(count))


def test_a_single_document_is_cut_at_a_line_near_the_held_out_share(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("0123456789abcdef\n" * 1001)
    folder = make(tmp_path, data=dict(heldout_fraction=0.1))
    assert documents(folder, "train") == ["0123456789abcdef\n" * 900]
    assert documents(folder, "heldout") == ["0123456789abcdef\n" * 101]
    assert Card.load(folder).counts["cut_in_two"] == 1


def test_a_held_out_fraction_of_zero_holds_out_nothing(tmp_path, corpus):
    folder = make(tmp_path, data=dict(heldout_fraction=0.0))
    assert list(Card.load(folder).splits) == ["train"] and not (folder / "heldout.bin").exists()
    assert len(documents(folder, "train")) == 300


def test_max_documents_reads_the_first_ones(tmp_path, corpus):
    folder = make(tmp_path, data=dict(max_documents=70, heldout_fraction=0.0))
    assert documents(folder, "train") == corpus[:70]


def test_the_standard_library_is_prepared_without_its_tests(tmp_path):
    from megatrain.data.corpus.sources import open_source

    given = config(tmp_path, data=dict(kind="python_stdlib", paths=[]))
    source: Any = open_source(given.data)
    names = [path.relative_to(source.root).as_posix() for path in source.files]
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names) and names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "idle_test"} & set(Path(name).parts)]
    assert source.total_bytes > 5_000_000
    folder = make(
        tmp_path, data=dict(kind="python_stdlib", paths=[], max_documents=30), tokenizer=dict(train_bytes=100_000)
    )
    assert len(documents(folder, "train") + documents(folder, "heldout")) > 20


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_dataset_in_the_shape_of_the_hub_is_streamed(tmp_path, form, monkeypatch):
    """The folder has shards, a split and further columns, like the datasets of the hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    for shard in range(2):
        part = texts(20, 20 * shard)
        if form == "parquet":
            table = pyarrow.table({"url": ["u"] * 20, "text": part})
            pyarrow.parquet.write_table(table, folder / f"train-0000{shard}-of-00002.parquet")
        else:
            (folder / f"train-0000{shard}-of-00002.jsonl").write_text(lines(part))
    data = dict(kind="huggingface", paths=[], hf_path=str(tmp_path / "hub"), heldout_fraction=0.0)
    assert documents(make(tmp_path, data=data), "train") == texts(40)
    with pytest.raises(ConfigError, match=r"data.text_column=body: .* has .*text"):
        make(tmp_path, data=data | dict(name="x", text_column="body"))
    with pytest.raises(ConfigError, match=r"data.hf_split=validation: .*train"):
        make(tmp_path, data=data | dict(name="x", hf_split="validation"))
    with pytest.raises(ConfigError, match=r"data.hf_path=.*none"):
        make(tmp_path, data=data | dict(name="x", hf_path=str(tmp_path / "none")))


def test_a_given_tokenizer_is_used_unchanged(tmp_path, corpus):
    first = make(tmp_path)
    second = make(tmp_path, data=dict(name="e"), tokenizer=dict(path=str(first / "tokenizer" / "tokenizer.model")))
    assert (first / "train.bin").read_bytes() == (second / "train.bin").read_bytes()
    assert Card.load(first).tokenizer == Card.load(second).tokenizer


def test_a_vocabulary_smaller_than_asked_is_said(tmp_path, corpus, capsys):
    folder = make(tmp_path, tokenizer=dict(vocab_size=20_000))
    found = Card.load(folder).tokenizer.vocab_size
    said = capsys.readouterr().err
    assert f"trained {found:,} pieces in " in said
    assert "fewer pieces than tokenizer.vocab_size=20000" in said and "nothing needs to be done" in said
    assert format_counts({"duplicates": 2, "too_short": 0, "read": 1_510}) == "read 1,510, duplicates 2"
    make(tmp_path, data=dict(name="e"), tokenizer=dict(vocab_size=found))
    assert "fewer" not in capsys.readouterr().err


def test_a_missing_corpus_is_noticed_before_a_hub_is_asked_for_the_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr("megatrain.data.preparation.find_tokenizer", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ConfigError, match="matches no file"):
        make(tmp_path, data=dict(paths=[str(tmp_path / "none" / "*.txt")]), tokenizer=dict(kind="hf", path="gpt2"))


def test_a_hugging_face_tokenizer_prepares_data(tmp_path, corpus):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    )
    made.save(str(tmp_path / "tokenizer.json"))
    folder = make(tmp_path, tokenizer=dict(kind="hf", path=str(tmp_path / "tokenizer.json")))
    assert sorted(documents(folder, "train") + documents(folder, "heldout")) == sorted(corpus)
    assert Card.load(folder).tokenizer.kind == "hf"
    with pytest.raises(ConfigError, match=r"tokenizer.path: missing"):
        make(tmp_path, data=dict(name="x"), tokenizer=dict(kind="hf"))


def test_vocabularies_from_65500_on_are_written_as_int32(tmp_path, corpus):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        piece: i for i, piece in enumerate([*alphabet, *(f"filler {i}" for i in range(70000)), "<|endoftext|>"])
    }
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    folder = make(tmp_path, tokenizer=dict(kind="hf", path=str(tmp_path / "tokenizer.json")))
    assert Card.load(folder).splits["train"].dtype == "int32"
    assert np.fromfile(folder / "train.bin", dtype=np.int32).max() == 70256
    assert sorted(documents(folder, "train") + documents(folder, "heldout")) == sorted(corpus)


def test_foreign_megatron_data_gets_a_folder_and_a_card_and_is_not_copied(tmp_path, corpus):
    ours = make(tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for split, name in (("train", "my.data_text_document"), ("heldout", "valid")):
        for suffix in (".bin", ".idx"):
            (foreign / (name + suffix)).write_bytes((ours / (split + suffix)).read_bytes())
    paths = [str(foreign / "my.data_text_document"), str(foreign / "valid.bin")]
    folder = make(
        tmp_path, data=dict(name="m", kind="megatron", paths=paths), tokenizer=dict(path=str(ours / "tokenizer"))
    )
    assert Card.load(folder).fingerprint == Card.load(ours).fingerprint
    assert documents(folder, "train") == documents(ours, "train") and (folder / "train.bin").is_symlink()
    bare = make(tmp_path, data=dict(name="n", kind="megatron", paths=paths[:1]))
    assert Card.load(bare).tokenizer is None and list(Card.load(bare).splits) == ["train"]
    verify_dataset(bare)
    for given, message in [([], "takes one prefix"), ([str(foreign / "none")], "there is no .*none.bin and .idx")]:
        with pytest.raises(ConfigError, match=message):
            make(tmp_path, data=dict(name="x", kind="megatron", paths=given))


# ---------------------------------------------------------------------------------------------------- finishing


def test_preparing_again_with_the_same_settings_changes_nothing(tmp_path, corpus, capsys):
    folder = make(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make(tmp_path, data=dict(workers=2)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "already prepared" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(data=dict(heldout_fraction=0.2)), r"data.heldout_fraction \(was 0.05, now 0.2\)"),
        (dict(tokenizer=dict(vocab_size=500)), r"tokenizer.vocab_size \(was 400, now 500\)"),
        (dict(seed=1), r"seed \(was 1234, now 1\)"),
    ],
)
def test_other_settings_under_the_same_name_are_refused_by_key(tmp_path, corpus, change, named):
    make(tmp_path)
    with pytest.raises(ConfigError, match=named):
        make(tmp_path, **change)


def test_a_changed_corpus_under_the_same_name_is_refused_and_overwritten_on_request(tmp_path, corpus):
    folder = make(tmp_path)
    (tmp_path / "in" / "f.txt").write_text("one more document")
    with pytest.raises(ConfigError, match=r"source.files \(was 64, now 65\).*data.overwrite=true"):
        make(tmp_path)
    assert Card.load(folder).counts["read"] == 300
    assert Card.load(make(tmp_path, data=dict(overwrite=True))).counts["read"] == 301
    assert os.listdir(tmp_path / "out") == ["d"]


def test_an_edit_that_keeps_every_size_is_seen(tmp_path, corpus):
    """One changed letter in one file, with equal file and byte counts, makes another corpus."""
    make(tmp_path)
    path = next(path for path in sorted((tmp_path / "in").iterdir()) if path.name.endswith(".txt"))
    text = path.read_bytes()
    path.write_bytes(bytes([text[0] ^ 1]) + text[1:])
    with pytest.raises(ConfigError, match=r"source.listing \(was .*data.overwrite=true"):
        make(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_touched(tmp_path, corpus, overwrite):
    (tmp_path / "out" / "d").mkdir(parents=True)
    (tmp_path / "out" / "d" / "thesis.doc").write_text("precious")
    with pytest.raises(ConfigError, match=r"exists and is not a prepared dataset"):
        make(tmp_path, data=dict(overwrite=overwrite))
    assert os.listdir(tmp_path / "out" / "d") == ["thesis.doc"]


def test_a_data_dir_that_is_a_file_is_refused_by_name(tmp_path, corpus):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match=r"data\.dir: .*out cannot be written \(File exists\)"):
        make(tmp_path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_a_data_dir_in_which_nothing_can_be_made_is_refused_by_name(tmp_path, corpus):
    with pytest.raises(ConfigError, match=r"data\.dir: /proc cannot be written"):
        make(tmp_path, data=dict(dir="/proc"))


KILLED = """
import os, signal, sys
from pathlib import Path
from megatrain.config import *
from megatrain.data import staging as finish, indexed, preparation as prepare
from megatrain.data.corpus import cleaned, encoded, selection
owner, name, count = eval(sys.argv[3]), sys.argv[4], int(sys.argv[5])
original = getattr(owner, name)
def dying(*args, **kwargs):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, dying)
data = DataConfig(name="d", dir=sys.argv[2], kind="files", paths=[sys.argv[1] + "/*"], workers=1, overwrite=True)
prepare.prepare(PrepareConfig(data=data, tokenizer=TokenizerConfig(vocab_size=400)))
"""


PUBLISHED = [("finish.os", "rename", "3"), ("finish.shutil", "rmtree", "3"), ("finish.shutil", "rmtree", "4")]
"""Places that are reached when the new dataset has its name already, if it replaced one."""


@pytest.mark.parametrize(
    "place",
    [
        ("cleaned.CleanedShardWriter", "add", "1"),
        ("cleaned.CleanedShardWriter", "finish", "1"),
        ("selection.Selection", "drop_duplicates", "1"),
        ("encoded.EncodedShardWriter", "add", "1"),
        ("encoded.EncodedShardWriter", "finish", "1"),
        ("indexed.IndexedWriter", "finish", "2"),
        ("prepare.Card", "save", "1"),
        ("finish.os", "rename", "1"),
        ("finish.os", "rename", "2"),
        ("finish.os", "rename", "3"),
        ("finish.shutil", "rmtree", "2"),
        ("finish.shutil", "rmtree", "3"),
        ("finish.shutil", "rmtree", "4"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_preparation_leaves_nothing_partial_and_restarts_cleanly(tmp_path, corpus, place, existing):
    """After a kill during an overwrite, either the old or the new dataset is in place."""
    out = tmp_path / "out"
    old = Card.load(make(tmp_path, data=dict(max_documents=50))).fingerprint if existing else None
    if not existing and place == ("finish.os", "rename", "3"):
        place = ("finish.os", "rename", "1")  # nothing to replace: there are two renames
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(out), *place], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    if (out / "d").exists():
        verify_dataset(out / "d")
        assert (Card.load(out / "d").fingerprint == old) == (place not in PUBLISHED if existing else False)
    else:
        assert not existing or place == ("finish.os", "rename", "2")
    fresh = Card.load(make(tmp_path, data=dict(name="fresh"))).fingerprint
    assert Card.load(make(tmp_path, data=dict(overwrite=True))).fingerprint == fresh != old
    assert sorted(os.listdir(out)) == ["d", "fresh"]


def test_an_error_leaves_nothing_behind(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("{")
    with pytest.raises(DataError):
        make(tmp_path)
    assert os.listdir(tmp_path / "out") == []


def test_two_preparations_of_one_name_at_once_are_refused(tmp_path, corpus):
    from megatrain.data.staging import StagingFolder

    with StagingFolder(tmp_path / "out" / "d"):
        with pytest.raises(OwnedError, match=r"d.preparing belongs to another job.*use another data.name"):
            make(tmp_path)
        make(tmp_path, data=dict(name="another"))
    make(tmp_path)


# ---------------------------------------------------------------------------------------------------- parts


def shards_of(folder, groups):
    """Write groups of texts as cleaned shards."""
    folder.mkdir(exist_ok=True)
    shards = []
    for number, group in enumerate(groups):
        writer = CleanedShardWriter(folder, f"s{number}")
        for start in range(0, len(group), 7):
            part = [text.encode() for text in group[start : start + 7]]
            writer.add(pack(part), describe(part, 5))
        shards.append(writer.finish())
    return shards


def selected(tmp_path, groups):
    return Selection(shards_of(tmp_path / "shards", groups), tmp_path / "flags")


@pytest.mark.parametrize("memory", [2**30, 4000])
def test_the_first_of_equal_documents_is_kept_in_one_pass_or_many(tmp_path, memory):
    values = np.random.default_rng(0).integers(0, 200, 500)
    selection = selected(tmp_path, [[str(value) for value in part] for part in (values[:90], [], values[90:])])
    seen, expected = set(), []
    for value in values:
        expected.append(TRAIN if value not in seen else DROPPED)
        seen.add(value)
    assert selection.drop_duplicates(memory) == expected.count(DROPPED)
    assert selection.flags.tolist() == expected


def test_the_tokenizers_sample_depends_on_the_documents_alone(tmp_path):
    every = [f"{i} " + "x" * (i % 91) for i in range(300)]
    budget = 5000
    draws = {text: int(describe([text.encode()], 5)["sample_draw"][0]) for text in every}
    expected, total = [], 0
    for text in sorted(every, key=lambda text: draws[text]):
        if total >= budget:
            break
        expected.append(text)
        total += len(text)
    for number, groups in enumerate([[every], [every[::-1]], [every[:7], [], every[7:150], every[150:]]]):
        selection = selected(tmp_path / str(number), groups) if (tmp_path / str(number)).mkdir() is None else None
        chosen = [group[at] for group, found in zip(groups, selection.sample(budget), strict=True) for at in found]
        assert sorted(chosen) == sorted(expected)


def test_workers_ignore_ctrl_c():
    """A terminal sends Ctrl-C to the workers as well, and each would print a stack trace."""
    with Workers(2) as pool:
        assert list(pool.map(signal.getsignal, [signal.SIGINT] * 3)) == [signal.SIG_IGN] * 3

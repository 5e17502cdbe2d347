"""Corpora as people have them: bad records, suffixes, nested fields, folders, odd column types and odd names."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.corpus.file_formats import json_values
from megatrain.data.corpus.sources import open_source
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import ConfigError, DataError


@pytest.fixture
def read(tmp_path):
    """Return the documents that a source gives for these keys; a file's content may be given by its name."""

    def go(files=None, **data):
        return documents(prepared(tmp_path, files, **data))

    return go


def prepared(tmp_path, files=None, **data):
    for name, content in (files or {}).items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    given = dict(name="d", dir=str(tmp_path / "out"), paths=[str(tmp_path / "in")], workers=1, heldout_fraction=0.0)
    return prepare(PrepareConfig(data=DataConfig(**given | data), tokenizer=TokenizerConfig(vocab_size=300)))


def documents(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    return [tokenizer.decode(ids.tolist()) for ids in IndexedDataset.open(folder, "train").documents()]


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


# ---------------------------------------------------------------------------------------------------- bad records

BAD = {
    "bad_not_json": '{"text": "cut',
    "bad_not_object": '["text"]',
    "bad_no_field": '{"body": "x"}',
    "bad_null": '{"text": null}',
    "bad_not_text": '{"text": 3}',
}


@pytest.fixture(params=["files", "huggingface"])
def with_bad(request, tmp_path, monkeypatch):
    """Keys that read two good records and a bad one from each kind of file, and the number of bad ones."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    source = tmp_path / "in"
    source.mkdir()
    nulls = pyarrow.table({"text": pyarrow.array(["one", None, "two"])})
    pyarrow.parquet.write_table(nulls, source / "a.parquet")
    if request.param == "huggingface":
        return dict(kind="huggingface", hf_path=str(source), paths=[]), {"bad_null": 1}
    (source / "b.jsonl").write_text(lines("three") + "\n".join(BAD.values()) + "\n" + lines("four"))
    (source / "c.txt").write_bytes(b"\xff")
    return dict(undecodable="skip"), {kind: 1 + (kind == "bad_null") for kind in BAD}


def test_bad_records_stop_are_skipped_or_go_to_quarantine_in_every_source(tmp_path, with_bad):
    keys, kinds = with_bad
    with pytest.raises(DataError, match=r"(a.parquet:2|in, row 2): no text under 'text': it is null; mend it, or set"):
        prepared(tmp_path, **keys)
    for policy in ("skip", "quarantine"):
        folder = prepared(tmp_path, name=policy, on_bad_record=policy, **keys)
        assert documents(folder) == (["one", "two"] if "hf_path" in keys else ["one", "two", "three", "four"])
        counts = Card.load(folder).counts
        assert {kind: counts[kind] for kind in kinds} == kinds and counts["bad"] == sum(kinds.values())
        assert Card.load(folder).config["data"]["on_bad_record"] == policy
        assert (folder / "quarantine.jsonl").exists() == (policy == "quarantine")
    kept = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    undecodable = [line for line in kept if line["reason"] == "undecodable"]
    assert len(kept) == counts["bad"] + counts["skipped_undecodable"]
    if "hf_path" not in keys:
        assert [line["record"] for line in kept if line["where"].startswith(str(tmp_path / "in" / "b"))] == [
            *BAD.values()
        ]
        assert kept[1]["where"].endswith("b.jsonl:2") and kept[1]["reason"] == "not_json"
        assert [line["record"] for line in undecodable] == ["\\xff"]
    assert Card.load(prepared(tmp_path, name="two", on_bad_record="skip", workers=2, **keys)).counts == counts
    total, bad = counts["read"], counts["bad"] + counts["skipped_undecodable"]
    prepared(tmp_path, name="ok", on_bad_record="skip", max_bad_fraction=bad / total, **keys)
    with pytest.raises(DataError, match=rf"^{bad} of {total} records are bad \(.*the first: .* or allow") as refused:
        prepared(tmp_path, name="x", on_bad_record="skip", max_bad_fraction=0.01, **keys)
    assert "read" not in str(refused.value).partition("(")[2].partition(")")[0], "reasons alone"
    enough = float(str(refused.value).rpartition("data.max_bad_fraction=")[2])
    prepared(tmp_path, name="enough", on_bad_record="skip", max_bad_fraction=enough, **keys)


# ---------------------------------------------------------------------------------------------------- layouts of files


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.json", "A.JSONL", "a.json.gz", "a.jsonl.gz", "A.NDJSON.GZ", "a.json.zst", "a.Json"],
)
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_lines_of_json_are_read_under_every_usual_suffix(read, name, start):
    content = (start + lines("one", "two")).encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix.lower(), bytes)
    assert read({name: packed(content)}) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.Md", "a.txt.gz", "a.md.zst"])
def test_a_text_is_one_document_under_every_usual_suffix(read, name):
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    assert read({name: packed(b"one\ntwo\n")}) == ["one\ntwo\n"]


RECORDS = [{"text": 'one ] , [ " \\ é'}, {"text": "two"}, {"text": "three\n"}]
TEXTS = [record["text"] for record in RECORDS]


@pytest.mark.parametrize(
    "content, expected",
    [
        (json.dumps(RECORDS), TEXTS),
        ("\ufeff \n" + json.dumps(RECORDS, indent=2) + "\n\n", TEXTS),
        (json.dumps(RECORDS[0], indent=1), TEXTS[:1]),
        ("\n".join(json.dumps(record, indent=1) for record in RECORDS), TEXTS),
        ('{"text": "a"}', ["a"]),
        (b'[{"text": "raw \xff"}]', ["raw \ufffd"]),
    ],
)
def test_a_json_file_may_be_an_array_or_an_object_over_several_lines(read, content, expected):
    assert read({"a.json": content}) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"text": "a"} {"text": "b"}]', r"a.json: not JSON at record 2 \('\{' where a comma should be\)"),
        ('[{"text": "a"}, {"text": ]', r"a.json: not JSON at record 2"),
        ('[{"text": "a"},', r"a.json: not JSON at record 2"),
        ('[{"text": "a"}', r"a.json: not JSON at record 2 \(the array does not end\)"),
        ('[{"text": "a"}] x', r"not JSON at record 2 \(there is more after the array\)"),
        ("[" * 100_000, r"a.json: not JSON at record 1"),
        ('[{"text": "' + "x" * 3_000_000 + '"}]', r"record 1 is longer than data.max_document_bytes=2000000"),
        ('[{"text": 1}]', r"a.json, record 1: no text under 'text': it is a number \(1\)"),
    ],
)
def test_a_damaged_array_is_named_with_the_record(read, content, message):
    with pytest.raises(DataError, match=message):
        read({"a.json": content}, max_document_bytes=2_000_000)


def test_an_array_is_read_piece_by_piece(monkeypatch, tmp_path):
    monkeypatch.setattr("megatrain.data.corpus.file_formats._READ_BYTES", 7)
    for content in (json.dumps(RECORDS), json.dumps(RECORDS, ensure_ascii=False, indent=3), "[]", "", "[12345678, 9]"):
        (tmp_path / "a").write_text(content)
        with open(tmp_path / "a", "rb") as file:
            assert [json.loads(text) for text in json_values(file, "a", 100)] == json.loads(content or "[]")


def test_a_nested_field_is_named_with_dots_in_every_source(tmp_path, read, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [{"content": {"text": "one", "n": 1}}, {"content": {"text": "two", "n": 2}}]
    nested = dict(text_column="content.text")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert read({"a.jsonl": text}, **nested) == ["one", "two"]
    with pytest.raises(DataError, match=r"no text under 'content.txt' \(it has 'content'\); set data.text_column"):
        read(name="x", text_column="content.txt")
    assert read({"a.jsonl": '{"content.text": "flat"}\n'}, name="flat", **nested) == ["flat"], (
        "the very name comes first"
    )
    (tmp_path / "in" / "a.jsonl").unlink()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in" / "a.parquet")
    assert read(name="p", **nested) == ["one", "two"]
    assert read(name="h", kind="huggingface", hf_path=str(tmp_path / "in"), **nested) == ["one", "two"]
    with pytest.raises(DataError, match=r"no column 'text' \(it has content, content.text, content.n\)"):
        read(name="x")
    with pytest.raises(DataError, match=r"column 'content' is struct<.*, not text"):
        read(name="x", text_column="content")


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.large_string(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
    ],
)
def test_a_text_column_of_parquet_may_have_any_type_that_holds_text(tmp_path, read, kind):
    (tmp_path / "in").mkdir()
    column = pyarrow.array(["one é", "two", "two", None]).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": range(4)}), tmp_path / "in" / "a.parquet")
    assert read(on_bad_record="skip", deduplicate=False) == ["one é", "two", "two"]


def test_two_columns_of_one_name_are_refused(tmp_path, read):
    (tmp_path / "in").mkdir()
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "in" / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: 2 columns are named 'text'; rename all but one"):
        read()


# ---------------------------------------------------------------------------------------------------- places


def test_a_folder_stands_for_the_files_below_it(tmp_path, read):
    files = {"b/c.txt": "two", "a.jsonl": lines("one"), "b/.hidden.txt": "no", "b/picture.png": b"\x89"}
    assert read(files) == ["one", "two"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.docx").touch()
    with pytest.raises(ConfigError, match=r"the folder .*other has no file with one of the suff.* \(it holds .docx\)"):
        read(paths=[str(tmp_path / "other")], name="x")


@pytest.mark.parametrize("pattern", ["v[1]", "v[1]/*.txt", "v[1]/a*(1).txt", "*/a b (1).txt", "v[1]/a b (1).txt"])
def test_a_path_that_exists_is_meant_literally(tmp_path, read, pattern):
    assert read({"v[1]/a b (1).txt": "here"}, paths=[str(tmp_path / "in" / pattern)]) == ["here"]


@pytest.mark.parametrize("pattern", ["*/v[1]/*.txt", "[uv]*/a.txt", "**/v[1]/a.txt"])
def test_brackets_are_a_glob_where_no_such_path_exists_and_a_name_where_the_glob_finds_nothing(tmp_path, read, pattern):
    name = "v1/a.txt" if pattern.startswith("[") else "x/v[1]/a.txt"
    assert read({name: "here"}, paths=[str(tmp_path / "in" / pattern)]) == ["here"]


def test_a_folder_of_save_to_disk_is_read_as_it_is(tmp_path, read):
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "in"))
    keys = dict(kind="huggingface", paths=[])
    assert read(hf_path=str(tmp_path / "one"), name="one", **keys) == ["one", "two"]
    assert read(hf_path=str(tmp_path / "in"), name="test", hf_split="test", **keys) == ["two"]
    with pytest.raises(ConfigError, match=r"data.hf_split=dev: .*the folder has train, test"):
        read(hf_path=str(tmp_path / "in"), name="x", hf_split="dev", **keys)
    for paths in ([str(tmp_path / "in")], [str(tmp_path / "in" / "train" / "*.arrow")], [str(tmp_path)]):
        with pytest.raises(ConfigError, match=r"was written by save_to_disk.*data=huggingface data.hf_path="):
            read(paths=paths, name="x")


def test_each_file_of_a_hub_dataset_is_a_part_that_is_read_again_if_it_changed(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.jsonl").write_text(lines(f"{name}1", f"{name}2"))

    def opened():
        source = open_source(DataConfig(name="d", kind="huggingface", hf_path=str(tmp_path / "in")))
        return source, list(source.shards())

    source, parts = opened()
    read = [[(record.payload, record.where) for record in source.read(part)] for part in reversed(parts)]
    assert [[text for text, _ in part] for part in read] == [["c1", "c2"], ["b1", "b2"], ["a1", "a2"]]
    assert read[0][1][1].endswith("in, part 3 of 3, row 2")
    assert opened()[1] == parts
    (tmp_path / "in" / "b.jsonl").write_text(lines("new", "b2"))
    source, changed = opened()
    assert not set(parts) & set(changed)
    assert [record.payload for record in source.records()] == ["a1", "a2", "new", "b2", "c1", "c2"]


def test_hugging_face_text_is_counted_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(lines("éé", "ab"))
    keys = dict(name="d", kind="huggingface", hf_path=str(tmp_path / "in"))
    source = open_source(DataConfig(**keys))
    assert [record.payload for record in source.records()] == ["éé", "ab"] and source.progress.bytes == 6
    with pytest.raises(DataError, match=r"row 1: longer than data.max_document_bytes=3"):
        list(open_source(DataConfig(**keys, max_document_bytes=3)).records())

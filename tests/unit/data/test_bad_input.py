"""Bad text gives one clear message with its place, is treated by the policy, and never exceeds the memory limit."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import tracemalloc
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import ConfigError, DataError

GOOD = "".join(json.dumps({"text": f"a good document, number {i}\n"}) + "\n" for i in range(50))


@pytest.fixture
def run(tmp_path):
    """Prepare a file with this name and content, on request beside files of GOOD text; return the dataset folder."""

    def go(file, content, /, beside=False, **data):
        source = tmp_path / "in"
        source.mkdir(exist_ok=True)
        if content is not None:
            (source / file).write_bytes(content)
        if beside:
            (source / "good.jsonl").write_text(GOOD)
        given = dict(name="d", dir=str(tmp_path / "out"), kind="files", paths=[str(source / "*")], workers=1)
        return prepare(PrepareConfig(data=DataConfig(**given | data), tokenizer=TokenizerConfig(vocab_size=400)))

    return go


def all_text(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    ids = [IndexedDataset.open(folder, split) for split in Card.load(folder).splits]
    return "".join(tokenizer.decode(dataset.read(0, dataset.num_tokens).tolist()) for dataset in ids)


def test_a_glob_without_a_match_and_a_file_of_another_kind_are_refused_by_key(run, tmp_path):
    with pytest.raises(ConfigError, match=r"data.paths: '.*nothing.*' matches no file"):
        run("a.txt", b"x", paths=[str(tmp_path / "in" / "*"), "nothing/*.txt"])
    with pytest.raises(ConfigError, match=r"data.paths: .*a.docx has none of the suffixes .txt"):
        run("a.docx", b"x")
    with pytest.raises(ConfigError, match=r"data.paths: empty"):
        run("a.txt", b"x", paths=[])
    with pytest.raises(ConfigError, match=r"data.paths: one of the paths is empty"):
        run("a.txt", b"x", paths=[""])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, content", [("a.txt", b""), ("a.jsonl", b"\n\n"), ("a.txt", b"\x01\x02"), ("a.jsonl", b'{"text": ""}')]
)
def test_an_empty_corpus_is_refused_with_what_was_read(run, name, content):
    with pytest.raises(DataError, match="the corpus is empty"):
        run(name, content)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "ok"}\n{"text": \n', r"a.jsonl:2: not a line of JSON"),
        (b'{"text": "ok"}\n\n["text"]\n', r"a.jsonl:3: no text under 'text' \(it is not a JSON object\)"),
        (b'{"body": "x", "id": 3}\n', r"a.jsonl:1: no text under 'text' \(it has 'body', 'id'\); set data.text_column"),
        (b'{"text": 3}\n', r"a.jsonl:1: no text under 'text': it is a number \(3\); mend it, or set data.on_bad_rec"),
        (b'{"text": null}\n', r"a.jsonl:1: no text under 'text': it is null; mend it, or set data.on_bad_record=skip"),
        (b'{"text": {"de": "x"}}\n', r"it is an object with 'de'; name a field in it, such as data.text_column=text."),
        (b"[" * 100000, r"a.jsonl:1: not a line of JSON"),
    ],
)
def test_a_line_that_is_not_a_record_is_named_by_file_and_line(run, content, message):
    with pytest.raises(DataError, match=message):
        run("a.jsonl", content)


BAD = b"fine\nbroken: \xff\xfe and \xc3\n"


@pytest.mark.parametrize("workers", [1, 2])
def test_undecodable_bytes_are_refused_with_file_byte_and_line(run, workers):
    with pytest.raises(DataError, match=r"bad.txt: not UTF-8 \(byte 13, line 2\); .* data.undecodable=replace or skip"):
        run("bad.txt", BAD, beside=True, undecodable="refuse", workers=workers)


def test_undecodable_bytes_are_replaced_or_their_document_skipped_and_counted(run):
    replaced = run("bad.txt", BAD, beside=True, name="r")
    assert "broken: \ufffd\ufffd and \ufffd\n" in all_text(replaced)
    assert Card.load(replaced).counts["undecodable"] == 1
    skipped = run("bad.txt", BAD, beside=True, name="s", undecodable="skip")
    assert "broken" not in all_text(skipped) and "number 49" in all_text(skipped)
    assert Card.load(skipped).counts["skipped_undecodable"] == 1


@pytest.mark.parametrize("file", ["a.txt", "a.md.gz", "a.jsonl", "a.json"])
@pytest.mark.parametrize("order, encoding", [("le", "utf-16"), ("be", "utf-16"), ("le", "utf-32"), ("be", "utf-32")])
def test_utf_16_and_utf_32_are_named_and_never_replaced(run, file, order, encoding):
    text = '{"text": "naïve"}\n' * 3 if "json" in file else "naïve\n" * 3
    content = ("\ufeff" + text).encode(f"{encoding}-{order}")
    content = gzip.compress(content) if file.endswith(".gz") else content
    how = "unpack it, and convert it" if file.endswith(".gz") else "convert it"
    message = rf"{file}.*: not UTF-8 \({encoding.upper()} by .*\); {how} with iconv -f {encoding} -t utf-8, or"
    for policy in ("replace", "refuse"):
        with pytest.raises(DataError, match=message):
            run(file, content, name=policy, undecodable=policy)
    skipped = run(file, content, beside=True, name="s", undecodable="skip", on_bad_record="skip")
    assert Card.load(skipped).counts["skipped_undecodable"] >= 1
    skipped = run(file, content, name="b", on_bad_record="skip")
    assert Card.load(skipped).counts["bad_not_utf_8"] == 1


def test_bad_bytes_and_lone_surrogates_in_json_follow_the_same_policy(run):
    content = b'{"text": "raw \xff byte"}\n{"text": "lone \\ud800 surrogate"}\n' + GOOD.encode()
    folder = run("a.jsonl", content, name="r")
    assert "raw \ufffd byte" in all_text(folder) and "lone \ufffd surrogate" in all_text(folder)
    assert Card.load(folder).counts["undecodable"] == 2
    for line, where in ((content.splitlines()[0], "byte 14"), (content.splitlines()[1], "a lone surrogate")):
        with pytest.raises(DataError, match=rf"b.jsonl:1: not UTF-8 \({where}"):
            run("b.jsonl", line, name="x", paths=[str(folder.parents[1] / "in" / "b.jsonl")], undecodable="refuse")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_advice_for_a_parquet_column_in_another_encoding_leaves_the_file_intact(run, tmp_path, encoding):
    (tmp_path / "in").mkdir()
    column = pyarrow.array(["naïve".encode(encoding)], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in" / "a.parquet")
    message = (
        rf"a.parquet:1: not UTF-8 \({encoding.upper()} by .*\); write its text as UTF-8 where the file is made, or"
    )
    with pytest.raises(DataError, match=message):
        run("", None, undecodable="refuse")


def test_undecodable_bytes_in_a_parquet_column_follow_the_policy(run, tmp_path):
    (tmp_path / "in").mkdir()
    column = pyarrow.array([b"bad \xff byte", b"good", None], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in" / "a.parquet")
    folder = run("", None, beside=True, on_bad_record="skip")
    assert "bad \ufffd byte" in all_text(folder) and Card.load(folder).counts["bad_null"] == 1
    with pytest.raises(DataError, match=r"a.parquet:1: not UTF-8"):
        run("", None, name="x", undecodable="refuse")


@pytest.mark.parametrize(
    ("table", "kind", "first"),
    [
        ({"text": [1, 2, 3]}, "not_text", "column 'text' is int64, not text"),
        ({"text": [["a"], ["b"], None]}, "not_text", "column 'text' is list<"),
        ({"body": ["a", "b", "c"], "n": [1, 2, 3]}, "no_field", "no column 'text' (it has body, n)"),
        ({"text": [None, None, None]}, "null", "no text under 'text': it is null"),
    ],
)
def test_a_parquet_without_text_is_as_many_bad_records_as_it_has_rows(run, tmp_path, capsys, table, kind, first):
    (tmp_path / "in").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "in" / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet:1: .*data.on_bad_record=skip or quarantine"):
        run("", None, beside=True)
    folder = run("", None, beside=True, on_bad_record="quarantine")
    counts = Card.load(folder).counts
    assert (counts["read"], counts["bad"], counts[f"bad_{kind}"]) == (53, 3, 3)
    kept = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [line["where"].rpartition("/")[2] for line in kept] == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    assert [json.loads(line["record"]) for line in kept] == (rows if kind != "null" else [None] * 3)
    assert f"a.parquet:1: {first}" in capsys.readouterr().err


def test_the_end_says_how_many_records_are_bad_of_what_kind_where_they_are_and_the_first(run, capsys):
    content = b'{"text": 3}\n[]\n{"text": null}\n{"text": null}\n'
    folder = run("a.jsonl", content, beside=True, on_bad_record="quarantine")
    said = capsys.readouterr().err
    kept = f"kept in {folder / 'quarantine.jsonl'}"
    assert f"bad records left out: 4 of 54 (not object 1, not text 1, null 2), {kept}" in said
    assert "a.jsonl:1: no text under 'text': it is a number (3)" in said
    assert "warning: 7.41% of the records are bad" in said
    run("a.jsonl", content, beside=True, name="s", on_bad_record="skip")
    assert "not kept; data.on_bad_record=quarantine keeps them" in capsys.readouterr().err
    run("a.jsonl", b'{"text": "\xff"}\n', beside=True, name="u", undecodable="skip")
    assert "bad records left out: 1 of 51 (undecodable 1)" in capsys.readouterr().err


def test_few_bad_records_are_counted_without_a_warning_and_none_are_not_mentioned(run, capsys):
    many = b"".join(b'{"text": "document %d"}\n' % number for number in range(99))
    run("a.jsonl", many + b'{"text": 3}\n', name="few", on_bad_record="skip")
    said = capsys.readouterr().err
    assert "bad records left out: 1 of 100 (not text 1)" in said and "warning" not in said
    run("a.jsonl", many, name="none", on_bad_record="skip")
    assert "bad records" not in capsys.readouterr().err


def test_an_empty_corpus_of_bad_records_names_the_first(run):
    with pytest.raises(
        DataError, match=r"the corpus is empty \(read 1, bad 1.*the first bad record: .*a.jsonl:1: no text"
    ):
        run("a.jsonl", b'{"text": 3}\n', on_bad_record="skip")


def compress(kind, data):
    return {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind](data)


@pytest.mark.parametrize("kind", ["gz", "zst", "bz2", "xz"])
@pytest.mark.parametrize("cut", [1, 5, 40, 150])
def test_a_truncated_compressed_file_is_named(run, kind, cut):
    data = "".join(json.dumps({"text": f"{i} {i**9}"}) + "\n" for i in range(500)).encode()
    with pytest.raises(DataError, match=rf"a.jsonl.{kind}: cut short or damaged"):
        run(f"a.jsonl.{kind}", compress(kind, data)[:-cut])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.html", "a.warc", "a.xml", "a.py"])
@pytest.mark.parametrize("kind", ["gz", "zst", "bz2", "xz"])
def test_an_empty_compressed_file_is_cut_short(run, name, kind):
    with pytest.raises(DataError, match=rf"{name}.{kind}: cut short or damaged"):
        run(f"{name}.{kind}", b"", beside=True)


def test_a_damaged_file_names_its_last_whole_record(run):
    lines = "".join(json.dumps({"text": f"{i} {i**99}"}) + "\n" for i in range(5000)).encode()
    with pytest.raises(DataError, match=r"a.jsonl.gz: cut .* the last whole record: .*a.jsonl.gz:\d{3,}\); download"):
        run("a.jsonl.gz", gzip.compress(lines)[:-9000])


@pytest.mark.parametrize("name", ["a.html", "a.jsonl", "a.txt.gz", "a.json.gz", "a.warc.gz", "a.xml.gz"])
@pytest.mark.parametrize("inner", ["gz", "zst", "bz2", "xz", "zip", "tar"])
def test_an_archive_in_a_file_is_a_bad_record(run, name, inner):
    if inner in ("zip", "tar"):
        packed = io.BytesIO()
        if inner == "zip":
            with zipfile.ZipFile(packed, "w") as archive:
                archive.writestr("good.jsonl", GOOD)
        else:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                archive.addfile(tarfile.TarInfo("good.jsonl"))
        content = packed.getvalue()
    else:
        content = compress(inner, GOOD.encode())
    content = gzip.compress(content) if name.endswith(".gz") else content
    with pytest.raises(DataError, match=rf"{name}: holds an? .*; unpack it first, or set data.on_bad_record=skip"):
        run(name, content)
    assert Card.load(run(name, content, beside=True, on_bad_record="skip")).counts["bad_archive"] == 1


@pytest.mark.parametrize("text", ["text\x00", "te\x00xt of a file\n" * 3])
def test_a_stray_nul_is_no_binary_file_but_many_or_undecodable_bytes_are(run, text):
    run("a.txt", text.encode(), beside=True)
    for content in (b"\xff\xd8\xff\xe0\x00\x10JFIF text", "text".encode("utf-16-le")):
        with pytest.raises(DataError, match=r"a.txt: binary, not text \(a NUL byte at \d\); leave the file out"):
            run("a.txt", content, beside=True, name="x")


@pytest.mark.parametrize("kind", ["gz", "zst", "bz2", "xz"])
def test_a_damaged_or_wrongly_named_compressed_file_is_named(run, kind):
    data = bytearray(compress(kind, GOOD.encode()))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    for content in (bytes(data), GOOD.encode()):
        with pytest.raises(DataError, match=rf"a.jsonl.{kind}: cut short or damaged"):
            run(f"a.jsonl.{kind}", content)


def test_a_cut_or_damaged_parquet_or_one_without_the_column_is_named(run, tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": [str(i**20) for i in range(2000)], "n": range(2000)}), path)
    whole = path.read_bytes()
    with pytest.raises(DataError, match=r"a.parquet:1: no column 'text' \(it has body, n\); set data.text_column"):
        run("", None)
    with pytest.raises(DataError, match=r"a.parquet:1: column 'n' is int64, not text"):
        run("", None, text_column="n")
    damaged = bytearray(whole)
    damaged[200:2000] = bytes(1800)
    for content in (whole[:-300], whole[:100], bytes(damaged)):
        with pytest.raises(DataError, match=r"a.parquet: cut short or damaged"):
            run("a.parquet", content, text_column="body")


LIMIT = 100_000


def huge(name, tmp_path):
    """Write a file with one huge record between two good ones; return its size in bytes."""
    path = tmp_path / "in" / name
    path.parent.mkdir()
    good = b'{"text": "a short document"}\n'
    if name.endswith(".txt"):
        with open(path, "wb") as file:
            file.truncate(2**30)
    elif name.endswith(".jsonl"):
        with open(path, "wb") as file:
            file.write(good + b'{"text": "')
            file.seek(2**30)
            file.write(b'"}\n' + good.replace(b"short", b"second"))
    else:
        data = good + b'{"text": "' + b"y" * 2**26 + b'"}\n' + good.replace(b"short", b"second")
        path.write_bytes(compress(name.rsplit(".", 1)[1], data))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_of_a_gigabyte_is_refused_or_skipped_without_being_read_into_memory(run, tmp_path, name):
    """A line of 1 GiB (64 MiB compressed) against a limit of 100 kB: memory stays below 24 MiB."""
    huge(name, tmp_path)
    run("good2.jsonl", GOOD.encode(), name="warm", paths=[str(tmp_path / "in" / "good2.jsonl")])
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"{name}(:2)?: longer than data.max_document_bytes=100000"):
            run("", None, beside=True, max_document_bytes=LIMIT)
        folder = run("", None, beside=True, max_document_bytes=LIMIT, oversized="skip")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert Card.load(folder).counts["oversized"] == 1
    assert "number 49" in all_text(folder) and ("second" in all_text(folder) or name == "a.txt")
    assert peak < 24 * 2**20, peak


def test_a_line_of_exactly_the_limit_is_accepted_and_one_byte_more_is_not(run):
    line = json.dumps({"text": "z" * 100}).encode()
    assert "z" * 100 in all_text(
        run("a.jsonl", line + b"\r\n" + GOOD.encode(), name="ok", max_document_bytes=len(line))
    )
    with pytest.raises(DataError, match=r"a.jsonl:1: longer than"):
        run("a.jsonl", line + b"\n" + GOOD.encode(), name="no", max_document_bytes=len(line) - 1)

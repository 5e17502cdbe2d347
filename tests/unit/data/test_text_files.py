"""With `data.write_text` a dataset has its clean text with ids and metadata, and tells why other records are not in."""

import json
import random
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from support.raw_corpora import DUMP_HEAD, DUMP_TAIL, warc_response, wiki_page

from megatrain import cli
from megatrain.config import DataConfig, PrepareConfig, PrepareLaunchConfig, TokenizerConfig
from megatrain.config.clean_config import CleanConfig
from megatrain.data.card import Card
from megatrain.data.preparation import prepare

LONG = "The library opens at nine, and the café at ten, says the sign number {} by the door of the house. "


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Cut corpora into shards of about 4,000 bytes, and read chunks of at most 7 records."""
    for module in ("shard", "files_source"):
        monkeypatch.setattr(f"megatrain.data.corpus.{module}.SHARD_BYTES", 4000)
    monkeypatch.setattr("megatrain.data.corpus.pipeline.CHUNK_RECORDS", 7)


def config(folder, name="d", clean=None, **data):
    given = {"kind": "files", "paths": [str(folder / "in")], "workers": 1, "write_text": True, **data}
    return PrepareConfig(
        1,
        DataConfig(name=name, dir=str(folder / "out"), **given),
        TokenizerConfig(vocab_size=300),
        clean or CleanConfig(),
    )


def lines_of(folder, kind):
    """Return the lines of all files of a kind, in order."""
    found = []
    for path in sorted((folder / kind).glob("*.jsonl.zst")):
        with open(path, "rb") as file:
            data = zstandard.ZstdDecompressor().stream_reader(file).read()
        found += [json.loads(line) for line in data.decode().splitlines()]
    return found


def write(folder, name, records):
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in" / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "in" / name


@pytest.fixture
def mixed(tmp_path):
    """Write records of which each kind of removal takes some; return their ids by the reason."""
    draws = random.Random(0)
    text = [" ".join(f"word{draws.randrange(900)}" for _ in range(60)) for _ in range(200)]
    records = [
        {"id": f"good-{number}", "text": text[number], "url": f"http://a.example/{number}"} for number in range(150)
    ]
    records += [{"id": f"copy-{number}", "text": text[number]} for number in range(20)]
    records += [{"id": f"near-{number}", "text": text[number] + " again"} for number in range(30, 40)]
    records += [{"id": f"short-{number}", "text": f"short {number}"} for number in range(5)]
    records += [{"id": f"empty-{number}", "text": ""} for number in range(3)]
    records += [{"id": f"null-{number}", "text": None} for number in range(2)]
    records += [{"id": "huge", "text": "x" * 3000}]
    write(tmp_path, "a.jsonl", records)
    with open(tmp_path / "in" / "a.jsonl", "a") as file:
        file.write("{\n")
    return records


CLEAN = CleanConfig(steps=[{"length": {"min_characters": 100}}], dedup="minhash")


def test_every_record_is_either_kept_or_removed_for_a_named_reason(tmp_path, mixed):
    policies = {"on_bad_record": "skip", "oversized": "skip", "max_document_bytes": 2000}
    folder = prepare(config(tmp_path, clean=CLEAN, **policies))
    kept, removed = lines_of(folder, "text"), lines_of(folder, "removed")
    counts = Card.load(folder).counts
    assert sum(split.documents for split in Card.load(folder).splits.values()) == len(kept)
    reasons = Counter((line["step"], line["reason"]) for line in removed)
    assert reasons == {
        ("length", "too_short"): 5,
        ("normalise", "empty"): 3,
        ("read", "not_json"): 1,
        ("read", "null"): 2,
        ("read", "oversized"): 1,
        ("dedup", "exact_duplicate"): counts["duplicates"],
        ("dedup", "near_duplicate"): counts["near_duplicates"],
    }
    assert counts["duplicates"] == 20 and counts["near_duplicates"] == 10
    all_ids = [line["id"] for line in [*kept, *removed]]
    unread = [one for one in all_ids if one.startswith(f"{tmp_path}/in/a.jsonl/")]
    assert len(unread) == 2, "the one that is no JSON, and the one that is too long to be read"
    assert sorted(set(all_ids) - set(unread)) == sorted(record["id"] for record in mixed if record["id"] != "huge")
    assert len(set(all_ids)) == len(all_ids) == len(mixed) + 1
    by_id = {line["id"]: line for line in removed}
    assert all(by_id[f"copy-{number}"]["reason"] == "exact_duplicate" for number in range(20))
    assert by_id["short-1"]["detail"] and set(by_id["short-1"]) == {"id", "source", "step", "reason", "detail"}
    assert {line["source"] for line in removed} == {str(tmp_path / "in" / "a.jsonl")}
    first = kept[0]
    assert first["text"] == mixed[0]["text"]
    assert first["metadata"] == {"url": "http://a.example/0"} and first["id"] == "good-0"


def test_the_text_prepared_again_is_the_same_dataset(tmp_path, mixed):
    """The second generation has the documents, ids, sources and metadata of the first; nothing is left to remove."""
    first = prepare(config(tmp_path, clean=CLEAN, on_bad_record="skip"))
    again = prepare(config(tmp_path, "again", clean=CLEAN, paths=[str(first / "text" / "*.jsonl.zst")]))
    for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx", "tokenizer/tokenizer.model"):
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    assert lines_of(again, "text") == lines_of(first, "text")
    assert not (again / "removed").exists() and lines_of(first, "removed")
    assert len(list((first / "text").iterdir())) > 5


@pytest.mark.parametrize("tasks", [1, 3])
def test_the_text_is_that_without_repeated_lines_and_names_what_is_left_of_none(tmp_path, tasks):
    notice = "This notice stands at the end of nearly every page of the site."
    lines = [LONG.format(number).strip() for number in range(120)]
    records = [{"id": f"page-{number}", "text": f"{lines[number]}\n{notice}"} for number in range(100)]
    records[50:50] = [
        {"id": f"notice-{number}", "text": f"{notice}\n\n"[: len(notice) + number]} for number in range(2)
    ]
    records += [{"id": "once-cut", "text": f"no\n{notice}"}, {"id": "the-same", "text": f"{notice}\nno\n{notice}"}]
    write(tmp_path, "a.jsonl", records)
    clean = CleanConfig(dedup_passages="lines", min_passage_characters=20)
    settings = config(tmp_path, clean=clean)
    for stage in ("clean", "select", "encode", "publish") if tasks > 1 else ("all",):
        for task in range(tasks) if stage in ("clean", "encode") else [None]:
            settings.launch = PrepareLaunchConfig(stage=stage, task=task, tasks=tasks if task is not None else 1)
            folder = prepare(settings)
    kept, removed = lines_of(folder, "text"), lines_of(folder, "removed")
    assert [line["id"] for line in kept] == [*(f"page-{number}" for number in range(100)), "once-cut"]
    assert [line["text"] for line in kept] == [f"{lines[0]}\n{notice}", *lines[1:100], "no"]
    assert {line["id"]: line["reason"] for line in removed} == {
        "notice-0": "nothing_left",
        "notice-1": "nothing_left",
        "the-same": "exact_duplicate",
    }
    split = Card.load(folder).splits
    assert sum(one.documents for one in split.values()) == len(kept)


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_gives_the_same_files(tmp_path, mixed, workers):
    one = prepare(config(tmp_path, clean=CLEAN, on_bad_record="skip"))
    more = prepare(config(tmp_path, "more", clean=CLEAN, on_bad_record="skip", workers=workers))
    for kind in ("text", "removed"):
        names = [path.name for path in sorted((one / kind).iterdir())]
        assert names == [path.name for path in sorted((more / kind).iterdir())]
        assert all((one / kind / name).read_bytes() == (more / kind / name).read_bytes() for name in names)


def test_a_records_own_id_is_kept_and_one_without_gets_its_place(tmp_path):
    texts = [LONG.format(number) for number in range(99)]
    own = [
        {"id": "a1", "text": texts[0]},
        {"id": 7, "text": texts[1]},
        {"text": texts[2]},
        {"id": "", "text": texts[3]},
    ]
    own += [{"id": True, "text": texts[4]}, {"id": {"a": 1}, "text": texts[5]}]
    lines = write(tmp_path, "lines.jsonl", own)
    large = write(tmp_path, "many.jsonl", [{"text": text} for text in texts[20:90]])  # several shards
    inside = tmp_path / "in"
    table = {"text": texts[6:9], "id": ["p1", None, "p3"], "url": ["http://p.example/1", None, None]}
    pyarrow.parquet.write_table(pyarrow.table(table), inside / "rows.parquet")
    (inside / "book.txt").write_text(texts[9])
    (inside / "pages.warc").write_bytes(warc_response(f"<p>{texts[10]}</p>".encode(), "http://w.example/1"))
    (inside / "wiki.xml").write_text(DUMP_HEAD + wiki_page("Apple", texts[11], 12) + DUMP_TAIL)
    found = lines_of(prepare(config(tmp_path, clean=CleanConfig(dedup="none"))), "text")
    ids = {line["text"].split("number ")[1].split(" ")[0]: line["id"] for line in found}
    assert [ids[str(number)] for number in range(12)] == [
        "a1", "7", f"{lines}/0/3", f"{lines}/0/4", f"{lines}/0/5", f"{lines}/0/6", "p1", f"{inside}/rows.parquet/0/2",
        "p3", f"{inside}/book.txt", "urn:uuid:http://w.example/1", "12",
    ]  # fmt: skip
    assert len(set(ids.values())) == len(ids) == 82
    assert {ids[str(number)].rpartition("/")[0] for number in range(20, 90)} == {
        f"{large}/0",
        f"{large}/4000",
        f"{large}/8000",
    }
    by_id = {line["id"]: line for line in found}
    assert by_id["p1"]["metadata"] == {"url": "http://p.example/1"} and by_id["p3"]["metadata"] == {}
    assert by_id["12"]["metadata"]["title"] == "Apple" and by_id["12"]["source"] == f"{inside}/wiki.xml"
    assert by_id["urn:uuid:http://w.example/1"]["metadata"]["url"] == "http://w.example/1"


def test_rows_of_the_hub_keep_their_ids(tmp_path):
    rows = {"text": [LONG.format(number) for number in range(30)], "id": [f"r{number}" for number in range(30)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    datasets.Dataset.from_dict({"text": rows["text"]}).save_to_disk(tmp_path / "bare")
    given = {"kind": "huggingface", "paths": []}
    found = lines_of(prepare(config(tmp_path, hf_path=str(tmp_path / "saved"), **given)), "text")
    assert [line["id"] for line in found] == rows["id"] and found[0]["source"] == str(tmp_path / "saved")
    bare = lines_of(prepare(config(tmp_path, "bare", hf_path=str(tmp_path / "bare"), **given)), "text")
    assert [line["id"] for line in bare] == [f"{tmp_path}/bare/0/{number}" for number in range(1, 31)]


def test_fields_of_other_layouts_come_along_and_the_text_does_not_twice(tmp_path):
    texts = [LONG.format(number) for number in range(20)]
    records = [
        {"content": {"text": texts[0]}, "id": "\ud800", "lang": "en", "source": "wild", "date": None},
        {"content": {"text": texts[1]}, "metadata": {"url": "http://a.example", "n": 1}, "license": "MIT"},
        *({"content": {"text": text}} for text in texts[2:]),
    ]
    write(tmp_path, "a.jsonl", records)
    first, second, *_ = lines_of(prepare(config(tmp_path, text_column="content.text")), "text")
    assert first == {"id": "\ud800", "source": "wild", "text": texts[0], "metadata": {"lang": "en"}}
    assert second["metadata"] == {"url": "http://a.example", "n": 1, "license": "MIT"}
    assert first["text"] == texts[0]


def test_a_licence_and_a_language_that_cleaning_found_are_written(tmp_path):
    (tmp_path / "in").mkdir()
    body = "\n".join(f"def function_{number}(value):\n    return value + {number}\n" for number in range(20))
    (tmp_path / "in" / "a.py").write_text("# SPDX-License-Identifier: MIT\n" + body)
    (line,) = lines_of(prepare(config(tmp_path, kind="code")), "text")
    assert line["metadata"]["license"] == "MIT" and line["metadata"]["programming_language"] == "Python"
    assert line["id"] == line["metadata"]["path"] == line["source"] == f"{tmp_path}/in/a.py"
    assert Card.load(tmp_path / "out" / "d").counts["cut_in_two"] == 1, "the text is that before the cut"
    write(tmp_path, "b.jsonl", [{"text": LONG.format(number) * 3} for number in range(5)])
    kept = lines_of(
        prepare(config(tmp_path, "l", clean=CleanConfig(steps=["language"]), paths=[f"{tmp_path}/in/b.jsonl"])), "text"
    )
    assert [line["metadata"] for line in kept] == [{"language": "en"}] * 5


def test_without_the_key_there_are_no_such_files_and_no_text_of_megatron_data(tmp_path, mixed, capsys):
    folder = prepare(config(tmp_path, clean=CLEAN, on_bad_record="skip", write_text=False))
    assert not (folder / "text").exists() and not (folder / "removed").exists()
    assert cli.main(["prepare", "data=megatron", "data.name=m", "data.paths=[x]", "data.write_text=true"]) == 2
    assert "data.write_text=true: data=megatron reads no text" in capsys.readouterr().err

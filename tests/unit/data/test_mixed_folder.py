"""A newcomer's folder of everything goes through `prepare` with the defaults, each file read by what it is."""

import gzip
import json
import lzma

import pytest
from support.raw_corpora import CHINESE, DUMP_HEAD, DUMP_TAIL, ENGLISH, warc_response, web_page, wiki_page

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import DataError

ROUND = 12


@pytest.fixture
def folder(tmp_path):
    """Write files of every kind, and say what texts they hold."""
    mixed = tmp_path / "in"
    (mixed / "project" / "src").mkdir(parents=True)
    for i in range(ROUND):
        (mixed / f"english{i}.html").write_text(web_page(f"{ENGLISH} English {i}."), encoding="utf-8")
        (mixed / f"chinese{i}.htm").write_bytes(web_page(f"{CHINESE}第{i}页。", "gbk").encode("gbk"))
        (mixed / "project" / "src" / f"f{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n")
        (mixed / f"note{i}.txt").write_text(f"A note, number {i}.")
    crawled = [web_page(f"{ENGLISH} Crawled {i}.").encode() for i in range(ROUND)]
    crawl = [warc_response(content, f"http://a.example/{i}") for i, content in enumerate(crawled)]
    (mixed / "crawl.warc.gz").write_bytes(b"".join(map(gzip.compress, crawl)))
    chats = [f"Chat {i}?" for i in range(ROUND)], [f"Yes, {i}." for i in range(ROUND)]
    messages = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in zip(*chats, strict=True)
    ]
    lines = "".join(json.dumps({"messages": one}) + "\n" for one in messages)
    (mixed / "chat.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (mixed / "rows.jsonl").write_text("".join(json.dumps({"text": f"Row {i}."}) + "\n" for i in range(ROUND)))
    articles = [wiki_page(f"T{i}", f"'''Article''' {i}.") for i in range(ROUND)]
    (mixed / "wiki.xml").write_text(DUMP_HEAD + "".join(articles) + DUMP_TAIL)
    (mixed / "project" / "LICENSE").write_text("MIT")
    (mixed / "picture.png").write_bytes(b"\x89PNG\0")
    return mixed


def config(folder, name="d", workers=1, **data):
    given = DataConfig(name=name, dir=str(folder.parent / "out"), paths=[str(folder)], workers=workers, **data)
    return PrepareConfig(data=given, clean=CleanConfig(steps=["html"]), tokenizer=TokenizerConfig(vocab_size=700))


def all_texts(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    found = []
    for split in Card.load(prepared).splits:
        dataset = IndexedDataset.open(prepared, split)
        ids = dataset.read(0, dataset.num_tokens).tolist()
        while ids:
            end = ids.index(tokenizer.end_of_document)
            found.append(tokenizer.decode(ids[:end]))
            ids = ids[end + 1 :]
    return found


def test_a_mixed_folder_goes_through_with_every_document_counted_by_kind(folder, capsys):
    prepared = prepare(config(folder))
    card = Card.load(prepared)
    kinds = {name: count for name, count in card.counts.items() if name.startswith("kind_")}
    times = {"html": 2, "warc": 1, "conversation": 1, "json": 1, "wikipedia": 1, "code": 1, "text": 1}
    assert kinds == {f"kind_{kind}": ROUND * count for kind, count in times.items()}
    assert sum(split.documents for split in card.splits.values()) == card.counts["read"] == 8 * ROUND
    said = capsys.readouterr().err
    assert "2 files of other kinds are not read (" in said and "markup" not in said
    texts = all_texts(prepared)
    for i in range(ROUND):
        for exact in (f"Row {i}.", f"A note, number {i}.", f"Article {i}.", f"User: Chat {i}?\n\nAssistant: Yes, {i}."):
            assert exact in texts
        assert f"def f{i}(x):\n    return x + {i}\n" in texts
        for part in (f"{ENGLISH} English {i}.", f"{CHINESE}第{i}页。", f"{ENGLISH} Crawled {i}."):
            (text,) = [text for text in texts if part in text]
            assert "<" not in text and "Section" not in text and "cookies" not in text


def test_the_cuts_and_the_workers_change_no_byte(folder, monkeypatch):
    whole = prepare(config(folder, "whole"))
    for module in ("shard", "files_source"):
        monkeypatch.setattr(f"megatrain.data.corpus.{module}.SHARD_BYTES", 300)
    monkeypatch.setattr("megatrain.data.corpus.pipeline.CHUNK_RECORDS", 5)
    cut = prepare(config(folder, "cut", workers=2))
    for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert Card.load(cut).counts == Card.load(whole).counts
    assert Card.load(cut).cleaning == Card.load(whole).cleaning


def test_one_damaged_file_among_many_is_named_and_mended_only_its_part_is_read_again(folder, capsys, monkeypatch):
    monkeypatch.setattr("megatrain.data.corpus.shard.SHARD_BYTES", 300)
    whole = (folder / "wiki.xml").read_bytes()
    (folder / "wiki.xml").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"wiki.xml: cut short or damaged .*the last whole record: .*page 'T"):
        prepare(config(folder))
    (folder / "wiki.xml").write_bytes(whole)
    prepare(config(folder))
    assert "parts of the corpus were cleaned earlier and are used again" in capsys.readouterr().err

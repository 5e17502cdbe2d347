"""However a corpus is cut, divided and interrupted, its dataset has the same bytes; what was finished is used again."""

import importlib.metadata
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pyarrow
import pyarrow.parquet
import pytest

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.corpus import cleaned, pipeline
from megatrain.data.corpus.cleaning import clean_chunk
from megatrain.data.corpus.encoded import EncodedShardWriter
from megatrain.data.corpus.encoding import encode_chunk
from megatrain.data.corpus.sources import open_source
from megatrain.data.corpus.worker_pool import Workers
from megatrain.data.preparation import prepare
from megatrain.errors import DataError

TEXTS = [f"Document {i} says {'word ' * (i % 40)}and ends.\n" for i in range(600)]


@pytest.fixture
def small_shards(monkeypatch):
    """Cut corpora into shards of about 4,000 bytes."""
    for module in ("shard", "files_source"):
        monkeypatch.setattr(f"megatrain.data.corpus.{module}.SHARD_BYTES", 4000)


@pytest.fixture
def corpus(tmp_path):
    """Write a file of lines, a parquet file of several row groups, and small files."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in TEXTS[:300]]
    lines[150:150] = ["", "  "]
    (folder / "a.jsonl").write_text("\n".join(lines))
    table = pyarrow.table({"text": TEXTS[300:500]})
    pyarrow.parquet.write_table(
        table, folder / "b.parquet", row_group_size=30, compression="none", use_dictionary=False
    )
    for i in range(500, 600):
        (folder / f"c{i}.txt").write_text(TEXTS[i])
    return folder


def config(folder, name="d", workers=1, **data):
    given = DataConfig(
        name=name, dir=str(folder.parent / "out"), kind="files", paths=[str(folder)], workers=workers, **data
    )
    return PrepareConfig(data=given, tokenizer=TokenizerConfig(vocab_size=400))


def interrupt_at_the_end(monkeypatch, settings):
    """Prepare up to the last stage, which Ctrl-C interrupts."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "join", interrupted)
        prepare(settings)


def shards(folder):
    return list(open_source(config(folder).data).shards())


def test_large_files_are_cut_and_small_ones_grouped_and_every_record_is_read_once_in_order(corpus, small_shards):
    found = shards(corpus)
    by_file = [{path.rsplit("/")[-1][0] for path in shard.paths} for shard in found]
    assert [len(names) for names in by_file] == [1] * len(found)
    assert min(sum(names == {name} for names in by_file) for name in "abc") >= 3, by_file
    source = open_source(config(corpus).data)
    texts = []
    for shard in found:
        for record in source.read(shard):
            texts.append(json.loads(record.payload)["text"] if record.kind == "json" else record.payload)
    assert [text.decode() if isinstance(text, bytes) else text for text in texts] == TEXTS
    assert sum(shard.num_bytes for shard in found if "b.parquet" not in shard.paths[0]) == sum(
        path.stat().st_size for path in corpus.iterdir() if path.name != "b.parquet"
    )


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
@pytest.mark.parametrize("size", [1, 7, 50, 4096])
def test_no_cut_loses_or_repeats_a_line(tmp_path, monkeypatch, ending, size):
    """Cuts fall inside of lines, between them, and inside of their ends."""
    for module in ("shard", "files_source"):
        monkeypatch.setattr(f"megatrain.data.corpus.{module}.SHARD_BYTES", size)
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": "x" * (i % 13)}) for i in range(60)]
    (tmp_path / "in" / "a.jsonl").write_bytes((ending or "\n").join(lines).encode() + ending.encode())
    source = open_source(config(tmp_path / "in").data)
    assert [record.payload.decode().strip() for record in source.records()] == lines


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_any_cut_and_any_number_of_workers_give_the_same_bytes(corpus, monkeypatch, workers):
    whole = prepare(config(corpus, "whole"))
    for module in ("shard", "files_source"):
        monkeypatch.setattr(f"megatrain.data.corpus.{module}.SHARD_BYTES", 4000)
    monkeypatch.setattr(pipeline, "CHUNK_RECORDS", 11)
    cut = prepare(config(corpus, "cut", workers))
    assert {path.name for path in cut.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("train.bin", "train.idx", "heldout.bin", "heldout.idx", "tokenizer/tokenizer.model"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert Card.load(cut).counts == Card.load(whole).counts


KILLED = """
import sys
from megatrain.config import *
from megatrain.data.corpus import files_source, pipeline, shard
from megatrain.data.preparation import prepare
shard.SHARD_BYTES = files_source.SHARD_BYTES = 4000
pipeline.CHUNK_RECORDS = 11
if __name__ == "__main__":
    data = DataConfig(name="d", dir=sys.argv[2], kind="files", paths=[sys.argv[1]], workers=int(sys.argv[3]))
    print("started", flush=True)
    prepare(PrepareConfig(data=data, tokenizer=TokenizerConfig(vocab_size=400)))
"""


def test_twenty_kills_at_random_moments_change_nothing(corpus, tmp_path, small_shards):
    """Starts live longer and longer, so that every stage is interrupted; a finished dataset is made anew."""
    expected = Card.load(prepare(config(corpus, "whole"))).fingerprint
    (tmp_path / "killed.py").write_text(KILLED)
    out, moments = tmp_path / "out", random.Random(0)
    kills = since = 0
    while kills < 20:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "killed.py"), str(corpus), str(out), "1"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        process.stdout.readline()
        since += 1
        time.sleep(moments.random() * 0.05 * since)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if (out / "d").exists():
            assert Card.load(out / "d").fingerprint == expected
            shutil.rmtree(out / "d")
            since = 0
    assert Card.load(prepare(config(corpus, "d"))).fingerprint == expected
    assert not (out / ".d.preparing").exists()


def test_what_was_finished_is_not_read_again(corpus, small_shards, monkeypatch, capsys):
    """The encoding is interrupted; the second start cleans nothing and trains no tokenizer."""
    original = EncodedShardWriter.finish
    finished = []

    def interrupted(self):
        finished.append(original(self))
        if len(finished) == 3:
            raise KeyboardInterrupt
        return finished[-1]

    monkeypatch.setattr(EncodedShardWriter, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(corpus))
    monkeypatch.setattr(EncodedShardWriter, "finish", original)
    again = []
    monkeypatch.setattr(pipeline, "clean_chunk", lambda task: again.append("clean") or clean_chunk(task))
    monkeypatch.setattr(pipeline, "encode_chunk", lambda task: again.append("encode") or encode_chunk(task))
    monkeypatch.setattr("megatrain.data.text_stages.train_tokenizer", None)
    capsys.readouterr()
    prepare(config(corpus))
    count = len(shards(corpus))
    assert again == ["encode"] * (count - 3)
    assert f"{count} of {count} parts of the corpus were cleaned earlier" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [dict(heldout_fraction=0.3), dict(deduplicate=False), dict(undecodable="skip"), dict(seed=5), dict(vocab=350)],
)
def test_after_a_changed_setting_nothing_stale_is_used(corpus, small_shards, monkeypatch, change):
    """The encoding of a preparation is interrupted at its end, and then done with another setting."""
    (corpus / "e.txt").write_bytes(b"not UTF-8: \xff")
    (corpus / "f.txt").write_text(TEXTS[3])

    def changed(name):
        settings = config(corpus, name, **{key: change[key] for key in change if key not in ("seed", "vocab")})
        settings.seed = change.get("seed", settings.seed)
        settings.tokenizer.vocab_size = change.get("vocab", 400)
        return settings

    interrupt_at_the_end(monkeypatch, config(corpus))
    resumed, fresh = (Card.load(prepare(changed(name))) for name in ("d", "fresh"))
    assert (resumed.fingerprint, resumed.counts) == (fresh.fingerprint, fresh.counts)


def test_a_damaged_file_is_mended_and_only_its_part_is_read_again(corpus, small_shards, monkeypatch):
    """It fails at its last file; everything before is kept, and the mended file is all that is cleaned."""
    (corpus / "d.jsonl").write_text("{")
    with pytest.raises(DataError, match="not a line of JSON"):
        prepare(config(corpus))
    (corpus / "d.jsonl").write_text('{"text": "mended"}')
    again = []
    monkeypatch.setattr(pipeline, "clean_chunk", lambda task: again.extend(task.records) or clean_chunk(task))
    prepare(config(corpus))
    assert len(again) < 60, len(again)
    again.clear()
    fresh = prepare(config(corpus, "fresh"))
    assert len(again) == 601
    assert Card.load(fresh).fingerprint == Card.load(fresh.with_name("d")).fingerprint


def test_bad_records_may_be_skipped_after_all_without_reading_the_rest_again(corpus, small_shards, monkeypatch):
    (corpus / "d.jsonl").write_text("{")
    with pytest.raises(DataError, match="not a line of JSON"):
        prepare(config(corpus))
    again = []
    monkeypatch.setattr(pipeline, "clean_chunk", lambda task: again.extend(task.records) or clean_chunk(task))
    assert Card.load(prepare(config(corpus, on_bad_record="skip"))).counts["bad"] == 1
    assert len(again) < 60, len(again)


def test_a_finished_part_that_was_changed_on_disk_is_made_again(corpus, small_shards, tmp_path):
    settings = config(corpus)
    source = open_source(settings.data)
    with Workers(1) as pool:
        first = pipeline.clean_source(source, settings, pool, tmp_path / "work")[0]
    assert cleaned.CleanedShard.find(tmp_path / "work", first.key)
    content = bytearray(first.text_path.read_bytes())
    content[len(content) // 2] ^= 1
    first.text_path.write_bytes(content)
    assert cleaned.CleanedShard.find(tmp_path / "work", first.key) is None


@pytest.mark.parametrize("limit", [1, 37, 450, 599, 5000])
def test_max_documents_reads_the_first_ones_across_shards(corpus, small_shards, limit):
    card = Card.load(prepare(config(corpus, max_documents=limit, deduplicate=False)))
    assert card.counts["read"] == min(limit, 600)


def test_documents_that_were_skipped_are_quarantined_after_all(corpus, small_shards, monkeypatch):
    """A part that was cleaned under another policy has not kept them."""
    (corpus / "a0.txt").write_bytes(b"not UTF-8: \xff")
    interrupt_at_the_end(monkeypatch, config(corpus, undecodable="skip"))
    folder = prepare(config(corpus, undecodable="skip", on_bad_record="quarantine"))
    assert "a0.txt" in (folder / "quarantine.jsonl").read_text()


@pytest.mark.parametrize("which", ["_CLEANING_LIBRARIES", "ENCODING_LIBRARIES"])
def test_a_part_made_by_another_version_of_a_library_is_made_again(corpus, small_shards, monkeypatch, which):
    """The preparation is interrupted before its end, then a library is upgraded."""
    interrupt_at_the_end(monkeypatch, config(corpus))
    again = []
    monkeypatch.setattr(pipeline, "clean_chunk", lambda task: again.append("_CLEANING_LIBRARIES") or clean_chunk(task))
    monkeypatch.setattr(pipeline, "encode_chunk", lambda task: again.append("ENCODING_LIBRARIES") or encode_chunk(task))
    installed = importlib.metadata.version
    monkeypatch.setattr(
        pipeline, "version", lambda name: "999" if name in getattr(pipeline, which) else installed(name)
    )
    prepare(config(corpus))
    assert which in again


def test_parts_of_another_end_token_are_encoded_again(corpus, small_shards, monkeypatch):
    """The tokenizer's file is the same; its end-of-document token is named beside it."""
    from megatrain.data.tokenizer_sentencepiece import SentencePieceTokenizer

    interrupt_at_the_end(monkeypatch, config(corpus))
    again = []
    monkeypatch.setattr(pipeline, "encode_chunk", lambda task: again.append(task) or encode_chunk(task))
    original = SentencePieceTokenizer.__init__

    def other_end(self, *arguments, **also):
        original(self, *arguments, **also)
        self.end_of_document = 5

    monkeypatch.setattr(SentencePieceTokenizer, "__init__", other_end)
    prepare(config(corpus))
    assert again

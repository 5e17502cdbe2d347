"""Repeated lines and paragraphs are cut out: what a plain dictionary over the corpus in order says, however divided."""

import json
import random
import re

import numpy as np
import pytest

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.corpus import passages as module
from megatrain.data.funnel import funnel
from megatrain.data.indexed_dataset import IndexedDataset
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_loading import load_tokenizer

SEPARATOR = {"lines": r"\n", "paragraphs": r"\n[ \t]*(?:\n[ \t]*)+"}


def without_repeats(texts, unit, least):
    """Go through the corpus in order with a dictionary of what was there: the texts left, and how many were cut."""
    seen, left, cut = {}, [], 0
    for text in dict.fromkeys(texts):  # documents of equal text are dropped before
        kept, changed, separator, rest = [], False, "", text
        while True:
            match = re.search(SEPARATOR[unit], rest)
            passage = rest[: match.start()] if match else rest
            if len(passage.strip()) >= least and passage.strip() in seen:
                cut, changed = cut + 1, True
            else:
                seen[passage.strip()] = True
                kept += [separator, passage] if kept else [passage]
            if not match:
                break
            separator, rest = match[0], rest[match.end() :]
        result = "".join(kept).strip("\n") if changed else text
        left += [result] if result.strip() else []
    return left, cut


def corpus(draw):
    """Return documents of lines and paragraphs of which many are repeated, within a document and across."""
    pool = [f"line {i} " + "abc 你好 "[: draw.randrange(9)] * draw.randrange(4) for i in range(25)]

    def line():
        return draw.choice(
            [draw.choice(pool), draw.choice(pool), f"  {draw.choice(pool)}\t", f"new {draw.random()}", "}"]
        )

    def document():
        return "".join(
            line() + draw.choice(["\n", "\n", "\n\n", "\n \n\n"]) for _ in range(draw.randrange(1, 7))
        ).strip()

    return [document() for _ in range(draw.randrange(30, 60))]


def prepared(folder, name, workers=1, memory=1024, **clean):
    data = DataConfig(
        name=name, dir=str(folder / "out"), paths=[str(folder / "in")], workers=workers, heldout_fraction=0
    )
    config = CleanConfig(dedup_memory_mb=memory, **clean)
    dataset = prepare(
        PrepareConfig(data=data, clean=config, tokenizer=TokenizerConfig(kind="byte_level_bpe", vocab_size=300))
    )
    tokenizer = load_tokenizer(dataset / "tokenizer")
    opened = IndexedDataset.open(dataset, "train")
    ids, texts = opened.read(0, opened.num_tokens).tolist(), []
    while ids:
        end = ids.index(tokenizer.end_of_document)
        texts.append(tokenizer.decode(ids[:end]))
        ids = ids[end + 1 :]
    return dataset, texts


def write(folder, texts, files):
    (folder / "in").mkdir(exist_ok=True)
    size = -(-len(texts) // files)
    for number in range(files):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number * size : (number + 1) * size]]
        (folder / "in" / f"{number:02}.jsonl").write_text("".join(lines))


def divide(monkeypatch, shard_bytes, records):
    for name in ("shard", "files_source"):
        monkeypatch.setattr(f"megatrain.data.corpus.{name}.SHARD_BYTES", shard_bytes)
    monkeypatch.setattr("megatrain.data.corpus.pipeline.CHUNK_RECORDS", records)


@pytest.mark.parametrize("unit", ["lines", "paragraphs"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_is_what_a_dictionary_over_the_corpus_leaves(tmp_path, monkeypatch, unit, seed):
    draw = random.Random(seed)
    texts = corpus(draw)
    write(tmp_path, texts, files=3)
    expected, cut = without_repeats(texts, unit, least=8)
    clean = dict(dedup_passages=unit, min_passage_characters=8, dedup="exact")
    whole, found = prepared(tmp_path, "whole", **clean)
    assert found == list(dict.fromkeys(expected))
    report = Card.load(whole).duplicate_passages
    assert report["changes"] == {unit: cut} and cut > 5
    assert report["documents_in"] - report["documents_out"] == report["rules"].get("nothing_left", 0)
    examples = (whole / "examples.jsonl").read_bytes()
    divide(monkeypatch, draw.randrange(100, 900), draw.randrange(1, 9))
    monkeypatch.setattr(module, "_BYTES_A_ROW", 2**16 * draw.randrange(1, 9))  # so little memory: many runs and passes
    for workers in (1, 2):
        other, again = prepared(tmp_path, f"cut{workers}", workers, memory=1, **clean)
        assert again == found
        assert Card.load(other).duplicate_passages == report
        assert (other / "train.bin").read_bytes() == (whole / "train.bin").read_bytes()
        assert (other / "examples.jsonl").read_bytes() == examples


def test_a_run_that_is_too_large_is_compared_in_several_passes(tmp_path, monkeypatch):
    texts = [f"line number {i % 700}\nanother {i}" for i in range(2000)]
    write(tmp_path, texts, files=1)
    monkeypatch.setattr(module, "_MAX_RUNS", 2)
    monkeypatch.setattr(module, "_BYTES_A_ROW", 2**12)  # 128 rows fit
    calls = []
    real = np.lexsort
    monkeypatch.setattr(np, "lexsort", lambda keys: calls.append(len(keys[0])) or real(keys))
    _, found = prepared(tmp_path, "d", memory=1, dedup="none", dedup_passages="lines", min_passage_characters=9)
    assert found == without_repeats(texts, "lines", 9)[0]
    assert len(calls) > 20 and max(calls) < 600, "hashes are not spread evenly, but no pass sees most of them"


def test_documents_dropped_as_duplicates_do_not_count_as_earlier_and_nothing_is_cut_by_default(tmp_path):
    repeated = "This line stands in many documents."
    texts = [f"{repeated}\nfirst one of them all", repeated, f"{repeated}\nfirst one of them all", f"x\n{repeated}"]
    write(tmp_path, texts, files=1)
    _, found = prepared(tmp_path, "d")
    assert found == [texts[0], texts[1], texts[3]]
    dataset, found = prepared(tmp_path, "cut", dedup_passages="lines")
    assert found == [texts[0], "x"]
    card = Card.load(dataset)
    assert card.counts["duplicates"] == 1
    stages = {stage.name: (stage.documents_in, stage.documents_out) for stage in funnel(card)}
    assert stages == {"exact duplicates": (4, 3), "duplicate_lines": (3, 2)}
    (removed, changed) = [json.loads(line) for line in (dataset / "examples.jsonl").read_text().splitlines()]
    assert {removed["step"], changed["step"]} == {"duplicate_lines"}
    assert {one["before"] for one in (removed, changed)} == {texts[1], texts[3]}


def test_documents_that_are_equal_once_cut_are_dropped_too(tmp_path):
    line = "A line of more than twenty characters."
    write(tmp_path, [line, f"same\n{line}", f"{line}\nsame", "other"], files=1)
    dataset, found = prepared(tmp_path, "d", dedup_passages="lines")
    assert found == [line, "same", "other"]
    assert Card.load(dataset).counts["duplicates_once_cut"] == 1
    assert [stage.name for stage in funnel(Card.load(dataset))] == ["duplicate_lines", "exact duplicates once cut"]


def test_an_interrupted_preparation_takes_what_is_cut(tmp_path, monkeypatch):
    write(tmp_path, corpus(random.Random(9)), files=2)
    clean = dict(dedup_passages="lines", min_passage_characters=8)
    _, expected = prepared(tmp_path, "whole", **clean)
    monkeypatch.setattr("megatrain.data.text_stages.TextStages.tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(tmp_path, "d", **clean)
    monkeypatch.undo()
    monkeypatch.setattr("megatrain.data.text_stages.cut_passages", lambda *_: 1 / 0)
    assert prepared(tmp_path, "d", **clean)[1] == expected


def test_cut_text_that_is_damaged_is_cut_again(tmp_path, monkeypatch):
    """A power cut may leave a file short that its marker says is whole."""
    write(tmp_path, corpus(random.Random(9)), files=2)
    clean = dict(dedup_passages="lines", min_passage_characters=8)
    _, expected = prepared(tmp_path, "whole", **clean)
    monkeypatch.setattr("megatrain.data.text_stages.TextStages.tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(tmp_path, "d", **clean)
    monkeypatch.undo()
    (cut,) = {path.parent for path in tmp_path.rglob(".d.preparing/work/cut/*.text")}
    for path in cut.glob("*.text"):
        path.write_bytes(path.read_bytes()[:-1])
    assert prepared(tmp_path, "d", **clean)[1] == expected


def test_examples_of_cut_text_that_is_used_again_are_numbered_as_the_corpus_is_now(tmp_path, monkeypatch):
    write(tmp_path, corpus(random.Random(9)), files=2)
    clean = dict(dedup_passages="lines", min_passage_characters=8)
    divide(monkeypatch, 800, 100)  # a few shards for each file
    with monkeypatch.context() as patch:
        patch.setattr("megatrain.data.text_stages.TextStages.tokenizer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(tmp_path, "d", **clean)
    (tmp_path / "in" / "0.jsonl").write_text(json.dumps({"text": "Nobody else says this."}) + "\n")  # now the first
    went_on, _ = prepared(tmp_path, "d", **clean)
    anew, _ = prepared(tmp_path, "anew", **clean)
    assert (went_on / "examples.jsonl").read_text() == (anew / "examples.jsonl").read_text()

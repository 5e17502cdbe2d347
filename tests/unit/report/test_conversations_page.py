"""Pages of conversations, and what `inspect` prints: how many tokens count in the loss, and which."""

import json
import re

import pytest
from support.pages import drawn, needs_browser

from megatrain import cli
from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.preparation import prepare
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.data.train_byte_level_bpe import train_byte_level_bpe
from megatrain.errors import DataError
from megatrain.report.corpus_page import collect_corpus
from megatrain.report.dataset_page import collect, report_dataset
from megatrain.verbs.printer import Printer

ANSWERS = [f"Answer <b>{number}</b> é" for number in range(10)]


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """A dataset of ten conversations with chatml; return its folder."""
    place = tmp_path_factory.mktemp("talks")
    talks = [
        [{"role": "user", "content": f"Question {answer[10]}?"}, {"role": "assistant", "content": answer}]
        for answer in ANSWERS
    ]
    (place / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    words = TokenizerConfig(kind="byte_level_bpe", vocab_size=280, chat_template="chatml")
    train_byte_level_bpe(iter(["the answer to a question"]), words).save(place / "words")
    data = DataConfig(
        name="talks", dir=str(place / "out"), kind="chat", paths=[str(place / "talks.jsonl")], workers=1,
        heldout_fraction=0.3,
    )  # fmt: skip
    tokenizer = TokenizerConfig(kind="hf", path=str(place / "words"))
    return prepare(PrepareConfig(seed=1, data=data, clean=CleanConfig(), tokenizer=tokenizer))


@pytest.fixture(scope="module")
def counted(talks):
    """The number of tokens of all answers, each with the token that ends it."""
    tokenizer = load_tokenizer(talks / "tokenizer")
    return sum(len(tokenizer.encode(answer)) + 1 for answer in ANSWERS)


def test_the_page_says_how_many_tokens_count_and_knows_its_records(talks, counted):
    data = collect(talks)
    said = {name: value for name, value in data["tokens"]["rows"] if name.startswith("count in the loss")}
    assert list(said) == ["count in the loss, train", "count in the loss, held out"]
    counts = [int(value.split()[0]) for value in said.values()]
    assert sum(counts) == counted and 0 < counts[1] < counts[0]
    tokens = Card.load(talks).splits["train"].tokens
    assert said["count in the loss, train"] == f"{counts[0]} ({counts[0] / tokens:.1%})"
    assert data["has_records"] and data["funnel"] == []
    assert {"<|im_start|>", "<|im_end|>"} <= {found["kind"] for found in data["tokens"]["frequent"]}


@needs_browser
def test_a_browser_marks_what_counts_and_names_control_tokens(talks, tmp_path):
    document = drawn(report_dataset(talks, tmp_path / "page.html"))
    assert "Every record became a document." in document and "nothing is known" not in document
    assert ">records read<" in document
    legend, *marked = re.findall(r"<mark>(.*?)</mark>", document)
    assert legend == "Marked" and "<b>0" not in document
    answers = [f"Answer &lt;b&gt;{number}&lt;/b&gt; é" for number in range(10)]
    assert len(marked) == 16 and set(marked[0::2]) <= set(answers)
    assert set(marked[1::2]) == {'<b class="control">&lt;|im_end|&gt;</b>'}
    assert document.count('<b class="control">&lt;|endoftext|&gt;</b>') == 8


def test_documents_of_a_folder_of_datasets_are_marked_too(talks):
    for sample in collect_corpus(talks.parent)["samples"]:
        assert "".join(piece["text"] for piece in sample["pieces"] if piece["counts"]).startswith("Answer <b>")
        assert "".join(p["text"] for p in sample["pieces"] if not p["is_control"]) == sample["text"]


def test_inspect_counts_what_counts_and_marks_it(talks, counted, capsys):
    assert cli.main(["inspect", str(talks), "samples=10"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(
        r"^  (train|heldout) +([\d,]+) +[\d.]+%$", out.partition("tokens that count in the loss")[2], re.M
    )
    assert sum(int(count) for _, count in rows) == counted and len(rows) == 2
    _, _, shown = out.partition("What counts in the loss is between [[ and ]]")
    assert sorted(re.findall(r"\[\[(.*?)\]\]", shown)) == sorted(f"{answer}<|im_end|>" for answer in ANSWERS)
    assert shown.count("<|im_start|>user\nQuestion ") == 10


def test_neighbours_that_are_marked_are_one_mark(capsys, monkeypatch):
    """In colour each piece is styled; without colours one pair of brackets encloses both."""
    pieces = [("a ", False), ("b", True), ("c", True), (" d", False)]
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    Printer().marked(pieces)
    assert capsys.readouterr().out == "a [[bc]] d\n"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    printer = Printer()
    printer.marked(pieces)
    assert capsys.readouterr().out == "a \x1b[32mb\x1b[0m\x1b[32mc\x1b[0m d\n"
    assert printer.legend("This") == "This is in green"


def test_a_file_of_counts_that_is_cut_or_missing_is_bad_data(talks, tmp_path, capsys):
    path = talks / "train.loss"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:5])
        for verb in ("report", "inspect"):
            assert cli.main([verb, str(talks)]) == DataError.exit_code
            printed = capsys.readouterr()
            assert str(path) in printed.err and "count in the loss" not in printed.out
        path.unlink()
        for verb in ("report", "inspect"):
            assert cli.main([verb, str(talks)]) == DataError.exit_code
            assert str(path) in capsys.readouterr().err
    finally:
        path.write_bytes(whole)

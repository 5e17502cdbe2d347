"""The page of several datasets and the sources of a run's mixture: by name, what was asked for and what was read."""

import json
import re
import shutil

import pytest
from support.pages import BOX, drawn, measured, needs_browser

from megatrain import cli
from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.preparation import prepare
from megatrain.report.corpus_page import collect_corpus, prepared_in, report_corpus
from megatrain.report.run_page import collect
from megatrain.report.sources import describe_sources
from megatrain.tracking.events import EventLog
from megatrain.tracking.metrics import MetricsLog

ATTACK = "<img src=x onerror=\"document.title='pwned'\">"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of two datasets of one tokenizer: 30 and 10 documents."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = None
    for name, count in (("prose", 30), ("talk", 10)):
        source = folder / f"{name}.jsonl"
        source.write_text("\n".join(json.dumps({"text": f"{name} {n} of the sea {ATTACK} " * 4}) for n in range(count)))
        prepare(
            PrepareConfig(
                data=DataConfig(
                    name=name, dir=str(folder / "both"), paths=[str(source)], heldout_fraction=0.2, workers=1
                ),
                clean=CleanConfig(),
                tokenizer=TokenizerConfig(vocab_size=300, path=tokenizer),
            )
        )
        tokenizer = str(folder / "both" / "prose" / "tokenizer")
    return folder / "both"


def test_each_source_has_its_sizes_and_its_share(corpus):
    page = collect_corpus(corpus)
    cards = {name: Card.load(corpus / name) for name in ("prose", "talk")}
    tokens = {name: sum(split.tokens for split in card.splits.values()) for name, card in cards.items()}
    prose, talk = page["sources"]
    assert (prose["name"], prose["documents"], talk["name"], talk["documents"]) == ("prose", 30, "talk", 10)
    for row in (prose, talk):
        card = cards[row["name"]]
        assert row["tokens"] == tokens[row["name"]] and row["heldout"] == card.splits["heldout"].tokens
        assert row["bytes"] == sum(split.bytes for split in card.splits.values())
        assert row["share"] == row["tokens"] / sum(tokens.values()) and row["target"] is None
    tile = {t["name"]: t["note"] for t in page["tiles"]}
    assert tile["documents"] == "" and tile["tokens"] == f"{sum(tokens.values()):,}"
    assert {sample["source"] for sample in page["samples"]} == {"prose", "talk"}
    assert page["notices"] == [] and page["name"] == "both"


def test_the_mixture_that_the_folder_names_is_the_target(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "both")
    (folder / "mixture.json").write_text('{"prose": 3, "talk": 1}')
    assert [row["target"] for row in collect_corpus(folder)["sources"]] == [0.75, 0.25]
    (folder / "mixture.json").write_text("[1")
    assert [row["target"] for row in collect_corpus(folder)["sources"]] == [None, None]


def test_packages_are_listed_once_with_their_sources(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "both")
    package = {"registry": "pip", "name": "texts", "version": "1.0", "license": "MIT", "sha256": "00"}
    other = package | {"name": "poems", "registry": "npm", "license": "CC0-1.0"}
    for name, packages in (("prose", [package, other]), ("talk", [package, package])):
        card = Card.load(folder / name)
        card.source = {"packages": packages}
        card.save(folder / name)
    assert collect_corpus(folder)["packages"] == [
        ["poems 1.0", "npm", "CC0-1.0", "prose"],
        ["texts 1.0", "pip", "MIT", "prose, talk"],
    ]


def test_datasets_of_different_tokenizers_are_told_apart(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "both")
    card = Card.load(folder / "talk")
    card.tokenizer = None
    card.save(folder / "talk")
    assert "different tokenizers" in collect_corpus(folder)["notices"][0]


def test_a_dataset_that_is_being_prepared_is_no_source(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "both")
    shutil.copytree(folder / "talk", folder / ".more.preparing")
    assert list(prepared_in(folder)) == ["prose", "talk"]


@needs_browser
def test_a_browser_draws_the_sources_and_texts_stay_texts(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "both")
    (folder / "mixture.json").write_text('{"prose": 3, "talk": 1}')
    document = drawn(report_corpus(folder))
    assert re.findall(r"<h2>(.*?)</h2>", document) == ["Sources", "Random documents"]
    heads = re.findall(r"<th>(.*?)</th>", document)
    assert heads == ["source", "documents", "text", "tokens", "held out", "share of tokens", "mixture"]
    assert "75%" in document and "25%" in document and "NaN" not in document and "undefined" not in document
    assert "<img" not in document and "prose: train document" in document


@needs_browser
def test_the_headers_of_the_sources_are_above_their_columns_and_bars_begin_at_one_x(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "both")
    (folder / "mixture.json").write_text('{"prose": 3, "talk": 0.009}')
    text = f"""[...document.querySelectorAll('.sources tr')].map(row => [...row.children].map(cell => {{
      const range = document.createRange(); range.selectNodeContents(cell); return {BOX}(range); }}))"""
    bars = f"[...document.querySelectorAll('.sources tr')].map(r => [...r.querySelectorAll('.level')].map({BOX}))"
    (head, *rows), (_, *levels) = measured(report_corpus(folder), f"[{text}, {bars}]")
    for row in rows:
        assert row[0][0] == pytest.approx(head[0][0], abs=0.5)
        assert [cell[2] for cell in row[1:]] == pytest.approx([cell[2] for cell in head[1:]], abs=0.5)
    assert [bar[0] for bar in levels[0]] == [bar[0] for bar in levels[1]] and len(levels[0]) == 2


def test_the_report_verb_takes_a_folder_of_datasets(corpus, tmp_path, capsys):
    assert cli.main(["report", str(corpus), f"out={tmp_path}/page.html"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/page.html\n"
    assert cli.main(["report", str(corpus.parent)]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- runs


def make_run(folder, corpus, **data):
    """A run's folder whose config mixes the two datasets, and that has read of them."""
    run = folder / "run"
    run.mkdir()
    settings = {
        "kind": "mixture",
        "name": "m",
        "dir": str(corpus),
        "mixture": {"prose": 0.6, "talk": 0.4},
        "phases": [],
    }
    (run / "config.yaml").write_text(json.dumps({"data": settings | data}))
    MetricsLog(run / "metrics.jsonl").append({"step": 1, "loss": 2.0})
    return run


def test_a_runs_page_has_what_was_read_of_each_source_against_the_mixture(corpus, tmp_path):
    run = make_run(tmp_path, corpus)
    assert [(row["name"], row["target"], row["read"]) for row in collect(run)["sources"]] == [
        ("prose", 0.6, None), ("talk", 0.4, None),
    ]  # fmt: skip
    seen = {
        "prose": {"samples": 9, "share": 0.9, "weight": 0.75, "epochs": 1.5},
        "talk": {"share": 0.1, "weight": 0.25, "epochs": 0.5},
    }
    EventLog(run / "events.jsonl").emit("mixture", 1, sources=seen)
    prose, talk = collect(run)["sources"]
    assert (prose["target"], prose["read"], prose["epochs"], prose["documents"]) == (0.75, 0.9, 1.5, 30)
    assert (talk["target"], talk["read"], talk["epochs"]) == (0.25, 0.1, 0.5)


def test_a_source_whose_dataset_is_gone_keeps_its_row(corpus, tmp_path):
    run = make_run(tmp_path, corpus, mixture={"prose": 0.6, "gone": 0.4})
    gone, prose = collect(run)["sources"]
    assert gone["documents"] is gone["tokens"] is gone["share"] is None and gone["target"] == 0.4
    assert prose["share"] == 1


@pytest.mark.parametrize("data", [{"mixture": {"prose": "much"}}, {"mixture": {}}, {"kind": "files", "mixture": {}}])
def test_a_run_without_a_mixture_or_with_an_edited_one_has_no_sources(corpus, tmp_path, data):
    assert collect(make_run(tmp_path, corpus, **data))["sources"] == []


@needs_browser
def test_a_browser_draws_the_sources_of_a_run(corpus, tmp_path):
    run = make_run(tmp_path, corpus)
    seen = {"prose": {"share": 0.9, "weight": 0.6, "epochs": 1.5}, "talk": {"share": 0.1, "weight": 0.4, "epochs": 0.5}}
    EventLog(run / "events.jsonl").emit("mixture", 1, sources=seen)
    assert cli.main(["report", str(run)]) == 0
    document = drawn(run / "report.html")
    assert "share read" in document and "epochs read" in document and "90%" in document and "NaN" not in document


def test_unknown_sizes_stay_unknown():
    (row,) = describe_sources({"a": None})
    assert {key: value for key, value in row.items() if key != "name"} == dict.fromkeys(
        ["documents", "bytes", "tokens", "heldout", "share", "target", "read", "epochs"]
    )

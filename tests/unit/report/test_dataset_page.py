"""The dataset report: one page, drawn by a real browser, with figures that were counted by hand."""

import json
import re
import shutil

import numpy as np
import pytest
from support.pages import BOX, References, drawn, measured, needs_browser, rows_of

from megatrain import cli
from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card, card_of_written, fingerprint
from megatrain.data.corpus.near_duplicates import NearDuplicates
from megatrain.data.indexed import IndexedWriter
from megatrain.data.preparation import prepare
from megatrain.data.text_stages import EXAMPLES
from megatrain.data.tokenizer_loading import load_tokenizer
from megatrain.errors import DataError
from megatrain.report.dataset_page import MAX_EXAMPLES, byte_size, collect, decoded, read_examples, report_dataset
from megatrain.report.text_diff import diff

ATTACK = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
WORDS = "the model reads and writes some words about data and tokens for all that it is worth "


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Prepare 40 records: 2 bad, 1 empty, 3 too short, 2 with an address, 4 copies; return the folder."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"{number} {WORDS * (1 + number % 3)}" for number in range(26)] + [f"100 {WORDS}"] * 5
    texts += [f"Write to anna.smith@mail{number}.org or not: {WORDS} {number}" for number in range(2)]
    texts += ["a", "bc", ATTACK[:9], f"{ATTACK} {WORDS}"]
    lines = [json.dumps({"text": text}) for text in ["", *texts]] + ["not json", '{"body": 1}']
    (folder / "<img src=x>.jsonl").write_text("\n".join(lines))
    return prepare(
        PrepareConfig(
            data=DataConfig(
                kind="files", name="made", dir=str(folder / "data"), paths=[str(folder / "*.jsonl")],
                on_bad_record="skip", heldout_fraction=0.2, workers=1,
            ),
            clean=CleanConfig(steps=[{"length": {"min_characters": 20}}, {"personal_data": {"kinds": ["email"]}}]),
            tokenizer=TokenizerConfig(vocab_size=320),
        )
    )  # fmt: skip


@pytest.mark.parametrize("missing", ["", "tokenizer.model", "megatrain_tokenizer.json"])
def test_a_dataset_without_its_tokenizer_is_bad_data_to_report_and_inspect_alike(dataset, tmp_path, capsys, missing):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    path = copy / "tokenizer" / missing
    if missing:
        path.unlink()
    else:
        shutil.rmtree(path)
    for verb in ("report", "inspect"):
        assert cli.main([verb, str(copy)]) == DataError.exit_code
        assert str(copy / "tokenizer") in capsys.readouterr().err


def test_the_figures_are_those_counted_by_hand(dataset):
    data = collect(dataset)
    assert [(s["name"], s["documents_in"], s["removed"], s["reasons"]) for s in data["funnel"]] == [
        ("bad records", 40, 2, {"no_field": 1, "not_json": 1}),
        ("empty", 38, 1, {}),
        ("length", 37, 3, {"too_short": 3}),
        ("personal_data", 34, 0, {}),
        ("exact duplicates", 34, 4, {}),
    ]
    length, mask = data["funnel"][2:4]
    assert length["bytes_in"] - length["bytes_out"] == 1 + 2 + 9
    assert mask["changed"] == 2 and mask["changes"] == {"email": 2}
    # anna.smith@mail0.org has 20 characters, <EMAIL> has 7
    assert mask["bytes_in"] - mask["bytes_out"] == 2 * (20 - 7)
    assert data["counted"] == [
        {"step": "records by kind", "counts": [("json", 38)]},
        {"step": "personal_data", "counts": [("email", 2)]},
    ]
    assert [s["name"] for s in data["splits"]] == ["train", "heldout"]
    assert sum(s["documents"] for s in data["splits"]) == 30
    tile = {t["name"]: (t["value"], t["note"]) for t in data["tiles"]}
    assert tile["documents"] == ("30", "") and tile["kept"] == ("75.0%", "of 40 records")
    tokens, size = (sum(s[name] for s in data["splits"]) for name in ("tokens", "bytes"))
    assert tile["tokens"][1] == f"{tokens:,}" and tile["bytes per token"][0] == f"{size / tokens:.2f}"
    assert sum(documents for _, documents, _ in data["lengths"]["bins"]) == 30
    assert sum(count for _, _, count in data["lengths"]["bins"]) == tokens
    facts = dict(data["tokens"]["rows"])
    assert facts["end tokens"] == f"30 ({30 / tokens:.2%} of tokens)"
    space = data["tokens"]["frequent"][0]
    assert space["share"] == space["count"] / tokens and space["text"]
    assert data["near_duplicates"] == []
    assert len(data["samples"]) == 8 and all(WORDS[:30] in s["text"] for s in data["samples"])


def test_examples_have_rule_and_detail_or_what_changed(dataset):
    removed, changed = collect(dataset)["examples"]
    assert (removed["step"], removed["rule"], len(removed["examples"])) == ("length", "too_short", 3)
    details = {e["pieces"][0][1]: e["detail"] for e in removed["examples"]}
    assert details["bc"] == "2 characters, fewer than 20"
    assert (changed["step"], changed["rule"], len(changed["examples"])) == ("personal_data", None, 2)
    ((kind, text),) = changed["examples"][0]["pieces"]
    assert kind == "=" and text.startswith("Write to <EMAIL> or not: ")


@pytest.mark.parametrize(
    "before, after, are_cut, expected",
    [
        ("one two three", "one 2 three", False, [["=", "one "], ["-", "two"], ["+", "2"], ["=", " three"]]),
        ("a\n\n\nb", "a\n\nb", False, [["=", "a\n\n"], ["-", "\n"], ["=", "b"]]),
        ("東京は", "東は", False, [["=", "東"], ["-", "京"], ["=", "は"]]),
        ("one two three", "one two", False, [["=", "one two"], ["-", " three"]]),
        ("one two three", "one two", True, [["=", "one two"]]),
        ("same", "same", True, [["=", "same"]]),
        ("", "new", False, [["+", "new"]]),
        (
            "x " * 300 + "old" + " y" * 300,
            "x " * 300 + "new" + " y" * 300,
            False,
            [
                ["~", "480 characters"],
                ["=", "x " * 60],
                ["-", "old"],
                ["+", "new"],
                ["=", " y" * 60],
                ["~", "480 characters"],
            ],
        ),
    ],
)
def test_a_diff_shows_changes_amid_what_stayed(before, after, are_cut, expected):
    assert diff(before, after, are_cut) == expected


@needs_browser
def test_a_browser_draws_every_section_and_texts_stay_texts(dataset, tmp_path):
    dataset = shutil.copytree(dataset, tmp_path / "made")
    with open(dataset / EXAMPLES, "a") as file:
        file.write(json.dumps({"step": "unicode", "id": "u", "before": "one <b> two", "after": "one <i> two"}) + "\n")
    document = drawn(report_dataset(dataset))
    titles = ["From records to training data", "Document lengths", "Tokens", "What was counted"]
    titles += ["What cleaning did", "Random documents"]
    assert re.findall(r"<h2>(.*?)</h2>", document) == titles
    bins = len(collect(dataset)["lengths"]["bins"])
    assert re.search(r'data-drawn="(\d+)"', document).group(1) == str(bins) == str(document.count('class="bin"'))
    stages = re.findall(r'<span class="stage">(?:<a[^>]*>)?(.*?)<', document)
    assert stages == [
        "records read", "bad records", "empty", "length", "personal data", "exact duplicates", "train", "held out"
    ]  # fmt: skip
    assert [left for left in re.findall(r'<span class="right left">(.*?)<', document)][:6] == [
        "40", "38", "37", "34", "34", "30"
    ]  # fmt: skip
    assert "removed: too short 3" in document and "<del>b</del><ins>i</ins>" in document
    assert "&lt;EMAIL&gt;" in document and "anna.smith" not in document
    assert "2 characters, fewer than 20" in document and "NaN" not in document and "undefined" not in document
    assert 'href="#step-0"' in document and 'id="step-0"' in document


@needs_browser
def test_a_stage_leads_to_its_examples_and_lengths_are_shown_by_tokens(dataset, tmp_path):
    """The test appends clicks on the second step's link and on the switch to the page's script."""
    page = report_dataset(dataset, tmp_path / "page.html")
    closed = drawn(page)
    script = """build();
      document.querySelectorAll('.funnel a')[1].click(); document.querySelector('[data-by="2"]').click();</script>"""
    page.write_text(re.sub(r"build\(\);\s*</script>", lambda _: script, page.read_text()))
    document = drawn(page)
    opened = [re.findall(r'<h3 id="step-\d">(.*?)</h3><details class="group" ?(.*?)>', d) for d in (closed, document)]
    assert opened == [
        [("length", 'open=""'), ("personal data", "")],
        [("length", 'open=""'), ("personal data", 'open=""')],
    ]
    heights = [
        re.findall(r'class="bin".*?height="([^"]*)".*?fill="var\(--(.)\)"', d, re.DOTALL) for d in (closed, document)
    ]
    assert {tone for _, tone in heights[0]} == {"a"} and {tone for _, tone in heights[1]} == {"c"}
    tokens = [n for _, _, n in collect(dataset)["lengths"]["bins"]]
    tallest = max(float(height) for height, _ in heights[1])
    assert [float(h) / tallest for h, _ in heights[1]] == pytest.approx([n / max(tokens) for n in tokens], abs=1e-6)


@needs_browser
def test_markup_in_documents_is_inert(dataset, tmp_path):
    """The attack is in a document, in an example, and in the name of the file that examples and settings name."""
    folder = tmp_path / "made"
    folder.mkdir()
    for path in dataset.iterdir():
        if path.name != "report.html":
            (folder / path.name).symlink_to(path)
    (folder / EXAMPLES).unlink()
    shown = {"step": ATTACK, "rule": ATTACK, "detail": ATTACK, "id": ATTACK, "before": ATTACK}
    (folder / EXAMPLES).write_text(json.dumps(shown) + "\n" + json.dumps(shown | {"rule": None, "after": f"x{ATTACK}"}))
    page = report_dataset(folder)
    document = drawn(page)
    assert "<title>made" in document and "<img" not in document and page.read_text().count("</script>") == 2
    assert document.count("&lt;/script&gt;&lt;script&gt;") >= 4


def test_the_page_fetches_nothing(dataset):
    page = report_dataset(dataset).read_text()
    references = References()
    references.feed(page)
    assert references.found == [] and "default-src 'none'" in page
    assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)


@needs_browser
def test_data_that_came_as_ids_has_a_page(tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    writer = IndexedWriter(folder / "train", np.dtype(np.int32))
    writer.add(np.array([3, 1, 70_000, 1], np.int32), np.array([3, 1], np.int32))
    writer.finish()
    split = card_of_written(writer, 0)
    split.bytes = None
    Card("foreign", fingerprint({"train": split}), {"train": split}, None).save(folder)
    data = collect(folder)
    assert data["funnel"] == [] and [t["name"] for t in data["tiles"]] == ["documents", "tokens"]
    assert [(f["id"], f["count"]) for f in data["tokens"]["frequent"]] == [(1, 2), (3, 1), (70_000, 1)]
    assert sorted((s["length"], s["text"]) for s in data["samples"]) == [(1, None), (3, None)]
    document = drawn(report_dataset(folder))
    assert "nothing is known of its records" in document and "3 1 70000" in document and "NaN" not in document


@needs_browser
def test_near_duplicates_are_shown_where_the_card_has_them(dataset, monkeypatch):
    found = NearDuplicates(12, 5, 6, {"4": 1, "2": 4}, compared=30, rejected=8, checked=20, below=1, mean_jaccard=0.875)
    load = Card.load

    def with_near_duplicates(folder):
        card = load(folder)
        card.near_duplicates = found.without_examples()
        return card

    monkeypatch.setattr(Card, "load", with_near_duplicates)
    rows = re.findall(r"<td>(.*?)</td><td>(.*?)</td>", drawn(report_dataset(dataset)).partition("Near duplicates")[2])
    assert rows[:6] == [
        ("dropped", "12 documents"),
        ("clusters", "5, the largest of 6 documents"),
        ("clusters by size", "2 to 3: 4 · 4 to 7: 1"),
        ("comparisons", "30, of which 8 are below the threshold"),
        ("checked by text", "20 pairs, of which 1 are below the threshold"),
        ("mean similarity", "0.875 (Jaccard, of the checked pairs)"),
    ]


def test_a_document_that_is_cut_inside_a_character_ends_before_it(dataset):
    tokenizer = load_tokenizer(dataset / "tokenizer")
    ids = tokenizer.encode("a 東")  # a character that was not in the training text is three bytes
    assert decoded(ids, len(ids), tokenizer) == {"text": "a 東", "is_cut": False}
    assert decoded(ids[:-1], len(ids), tokenizer) == {"text": "a ", "is_cut": True}
    assert decoded([320], 1, tokenizer)["text"] is None, "an id that the tokenizer does not have"


def test_damaged_and_many_examples_are_told(dataset, tmp_path):
    path = tmp_path / EXAMPLES
    example = json.dumps({"step": "length", "rule": "too_short", "id": "a", "before": "x"})
    cluster = {"step": "near_duplicates", "documents": 3, "jaccard": 0.9,
               "members": [{"id": 1, "text": "one two"}, {"id": 2, "text": "one 2"}]}  # fmt: skip
    path.write_text("\n".join(["{", "[]", json.dumps(cluster), *[example] * (MAX_EXAMPLES + 5)]))
    groups, notices = read_examples(path)
    assert [(g["step"], len(g["examples"])) for g in groups] == [("near_duplicates", 1), ("length", MAX_EXAMPLES - 1)]
    assert groups[0]["examples"][0]["pieces"] == [["=", "one "], ["-", "two"], ["+", "2"]]
    assert "2 lines cannot be read" in notices[0] and f"shows {MAX_EXAMPLES} of {MAX_EXAMPLES + 6}" in notices[1]


def test_a_change_whose_former_text_is_hidden_is_shown_as_it_is_now(tmp_path):
    path = tmp_path / EXAMPLES
    path.write_text(json.dumps({"step": "personal_data", "id": "a", "after": "write to <EMAIL>"}))
    groups, notices = read_examples(path)
    assert groups[0]["examples"][0]["pieces"] == [["=", "write to <EMAIL>"]] and not notices


def test_the_report_verb_knows_a_dataset_and_names_all_kinds_of_folders(dataset, tmp_path, capsys):
    assert cli.main(["report", str(dataset), f"out={tmp_path}/page.html"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/page.html\n"
    assert "From records to training data" in (tmp_path / "page.html").read_text()
    assert cli.main(["report", str(dataset.parent.parent)]) == 2
    error = capsys.readouterr().err
    assert "not the folder of a run" in error and "of a sweep" in error and "of a prepared dataset" in error


SIZES = {0: "0 B", 999: "999 B", 1000: "1 kB", 6023: "6.02 kB", 20_500: "20.5 kB", 999_600: "1 MB", 1.75e9: "1.75 GB",
         2e12: "2 TB"}  # fmt: skip


def test_a_size_in_bytes_has_three_digits_and_a_unit():
    assert {size: byte_size(int(size)) for size in SIZES} == SIZES


@needs_browser
def test_scripts_write_a_size_in_bytes_alike(dataset, tmp_path):
    page = report_dataset(dataset, tmp_path / "page.html")
    assert measured(page, f"{list(map(int, SIZES))}.map(size)") == list(SIZES.values())


@needs_browser
@pytest.mark.parametrize("width", [500, 700, 1200, 1600])
def test_bars_of_a_list_are_equally_long_and_quantiles_and_the_histogram_fill_their_card(dataset, tmp_path, width):
    bars, quantiles, card, end = measured(
        report_dataset(dataset, tmp_path / "page.html"),
        f"""[[...document.querySelectorAll('.lists')].map(l => [...l.querySelectorAll('.bar')].map({BOX})),
        [...document.querySelectorAll('.quantiles > div')].map({BOX}),
        ...[document.querySelector('.fills'), document.querySelector('.fills').lastElementChild].map({BOX})]""",
        width,
    )
    for boxes in bars:
        assert max(right - left for left, _, right, _ in boxes) == pytest.approx(
            min(right - left for left, _, right, _ in boxes), abs=0.5
        )
    assert len(bars[0]) == 24
    assert {len(row) for row in rows_of(quantiles)} in ({9}, {3})
    assert card[3] - end[3] <= 15


@needs_browser
def test_quantiles_on_a_phone_are_in_three_rows_of_three(dataset, tmp_path):
    narrow = "document.querySelector('main').style.width = '380px'"
    boxes = f"[...document.querySelectorAll('.quantiles > div')].map({BOX})"
    (boxes,) = measured(report_dataset(dataset, tmp_path / "page.html"), f"({narrow}, [{boxes}])")
    assert [len(row) for row in rows_of(boxes)] == [3, 3, 3]

"""Web pages are decoded whatever their encoding, keep their markup unless a step extracts it, and cannot be bombs."""

import gzip
import json
import time

import pytest
from support.raw_corpora import CHINESE, ENGLISH, JAPANESE, TRADITIONAL, web_page

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.corpus.decoding import decode
from megatrain.data.corpus.document import Document
from megatrain.data.corpus.html_bytes import decode_html
from megatrain.data.corpus.recipe import build_recipe
from megatrain.data.corpus.record import Policy, Record
from megatrain.data.preparation import prepare
from megatrain.errors import ConfigError, DataError


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "text, encoding",
    [
        (ENGLISH, "utf-8"),
        (ENGLISH, "windows-1252"),
        (CHINESE, "utf-8"),
        (CHINESE, "gbk"),
        (CHINESE, "gb18030"),
        (TRADITIONAL, "big5"),
        (JAPANESE, "shift_jis"),
        (JAPANESE, "euc-jp"),
        (JAPANESE, "iso-2022-jp"),
    ],
)
def test_a_page_is_decoded_from_the_encoding_it_names_or_looks_like(text, encoding, named):
    written = web_page(text, encoding if named else None)
    assert decode_html(written.encode(encoding)) == (written, False)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_decides(encoding):
    assert decode_html(web_page(CHINESE, "latin-1").encode(encoding)) == (web_page(CHINESE, "latin-1"), False)


def test_a_server_may_name_the_encoding_and_a_false_name_does_no_harm():
    assert decode_html("<p>naïve</p>".encode("cp1252"), "ISO-8859-1") == ("<p>naïve</p>", False)
    for charset in ("iso-8859-1", "nonsense"):
        assert decode_html(web_page(CHINESE).encode(), charset) == (web_page(CHINESE), False)
    assert decode_html(web_page(CHINESE, "utf-8").encode("gbk")) == (web_page(CHINESE, "utf-8"), False)


def test_bytes_of_no_encoding_are_replaced_or_refused():
    broken = web_page(CHINESE, "gbk").encode("gbk").replace("请".encode("gbk"), b"\xff\xff\xff")
    record = Record(broken, "a.html", kind="html", markup=True)
    decoded = decode(record, Policy("text", "replace"))
    assert decoded.undecodable and "\ufffd" in decoded.text and "图书馆早上九点" in decoded.text
    with pytest.raises(DataError, match=r"a.html: not UTF-8 \(in no encoding that it names or resembles\)"):
        decode(record, Policy("text", "refuse"))


def extracted(markup, **parameters):
    (step,) = build_recipe([{"html": parameters}])
    document = Document(markup, "a", markup=True)
    removal = step.apply(document)
    return removal.rule if removal else document


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_the_main_content_is_extracted_and_on_request_all_text(extractor, text):
    document = extracted(web_page(text), extractor=extractor)
    assert not document.markup
    assert text in document.text and text[::-1] in document.text and "Opening hours" in document.text
    for other in ("<", "never text", "color", "Section 3", "cookies"):
        assert other not in document.text
    whole = extracted(web_page(text), extractor=extractor, main_content=False).text
    assert text in whole and "Section 3" in whole and "never text" not in whole
    assert extracted(web_page(text), extractor=extractor).text == document.text, "a page seen before changes nothing"


def test_text_that_is_no_markup_stays_as_it_is():
    (step,) = build_recipe(["html"])
    document = Document("1 <b 2 and c> d", "a")
    assert step.apply(document) is None and document.text == "1 <b 2 and c> d"


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_bombs_are_removed_before_they_are_extracted(extractor):
    assert extracted("<div>" * 300_000 + "text", extractor=extractor) == "too_deep"
    assert extracted("<font>" * 300_000 + "text", extractor=extractor) == "too_deep"
    assert extracted("<p>" + "a" * 100, extractor=extractor, max_bytes=50) == "too_large"
    assert extracted("<script>1</script>", extractor=extractor) == "no_text"
    assert "deep" in extracted("<p>deep</p>" + "<div>" * 300 + web_page("deep " * 40), max_depth=400).text
    assert extracted("<div>" * 300 + web_page("deep " * 40), max_depth=200) == "too_deep"


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
@pytest.mark.parametrize(
    "tag",
    [
        " ".join(f"a{i}" for i in range(200_000)),
        "/".join(f"a{i}='>'" for i in range(2000)),
        "a " * 20_000 + " ".join(f'a{i} = "1"' for i in range(2000)),
    ],
)
def test_an_element_with_too_many_attributes_is_removed_before_it_is_parsed(tag, extractor):
    page = f"<html><body><svg><style><p {tag}>{ENGLISH}</p>"
    begun = time.monotonic()
    assert extracted(page, extractor=extractor) == "too_many_attributes"
    assert time.monotonic() - begun < 5  # parsing them takes minutes


def test_pages_with_many_attributes_in_all_or_long_ones_are_extracted():
    classes = " ".join(f"c{i}" for i in range(5000))
    links = "".join(f"<a href='/{i}' id=x{i}>{i}</a>" for i in range(2000))
    script = "<script>if (i <n) {" + "var x = 1; " * 500 + "}</script>"
    page = web_page(ENGLISH).replace("<main>", f'{script}<main class="{classes}">{links}')
    assert ENGLISH in extracted(page).text
    exactly = web_page(ENGLISH).replace("<main>", "<main " + " ".join(f"a{i}=1" for i in range(9)) + ">")
    assert ENGLISH in extracted(exactly, max_attributes=9).text
    assert extracted(exactly, max_attributes=8) == "too_many_attributes"


def prepared(tmp_path, name="d", steps=(), **data):
    given = {"name": name, "dir": str(tmp_path / "out"), "paths": [str(tmp_path / "in")], "workers": 1} | data
    clean, tokenizer = CleanConfig(steps=list(steps)), TokenizerConfig(vocab_size=400)
    return prepare(PrepareConfig(data=DataConfig(**given), clean=clean, tokenizer=tokenizer))


@pytest.fixture
def pages(tmp_path):
    """Write pages in several encodings and compressions, and a text that only looks like one."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.html").write_bytes(web_page(ENGLISH).encode())
    (folder / "b.HTM").write_bytes(web_page(CHINESE, "gbk").encode("gbk"))
    (folder / "c.xhtml.gz").write_bytes(gzip.compress(web_page(TRADITIONAL, "big5").encode("big5")))
    (folder / "d.txt").write_text("a tag such as <b> in a text about HTML")
    return folder


def test_without_a_step_html_stays_markup_and_the_terminal_says_so_once(tmp_path, pages, capsys):
    card = Card.load(prepared(tmp_path))
    said = capsys.readouterr().err
    assert said.count("3 documents are HTML, and the tags stay in the text; clean=web extracts the text") == 1
    assert (card.counts["kind_html"], card.counts["kind_text"], card.counts["markup"]) == (3, 1, 3)
    assert "read as: html 3, text 1" in said
    (pages / "a.html").unlink()
    (pages / "b.HTM").unlink()
    prepared(tmp_path, "one")
    assert "note: 1 document is HTML, and the tags stay" in capsys.readouterr().err
    prepared(tmp_path, "clean", ["html"])
    assert " HTML, and" not in capsys.readouterr().err


def test_examples_name_the_page_and_the_text_is_extracted(tmp_path, pages):
    folder = prepared(tmp_path, steps=["html"])
    card = Card.load(folder)
    (report,) = card.cleaning
    assert (report["documents_in"], report["documents_out"], report["changed"]) == (4, 4, 3)
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert {example["id"] for example in examples} == {str(pages / name) for name in ("a.html", "b.HTM", "c.xhtml.gz")}
    assert any(CHINESE in example["after"] for example in examples)


@pytest.mark.parametrize("content, message", [(b"\x89PNG\r\n\x1a\n\0\0", "binary, not text"), (b"PK\x03\x04..", "zip")])
def test_what_is_no_page_is_refused_by_name_or_left_out(tmp_path, pages, content, message):
    (pages / "e.html").write_bytes(content)
    with pytest.raises(DataError, match=rf"e.html: .*{message}.*data.on_bad_record=skip"):
        prepared(tmp_path)
    card = Card.load(prepared(tmp_path, on_bad_record="skip"))
    assert card.counts["bad"] == 1 and card.counts["kind_html"] == 3


def test_files_of_a_folder_that_are_not_read_are_counted(tmp_path, pages, capsys):
    for name in ("x.docx", "y.DOCX", "z.png", "Makefile", "hidden.jsonl.gz.gz"):
        (pages / name).write_bytes(b"x")
    prepared(tmp_path)
    assert "5 files of other kinds are not read (.docx 2, " in capsys.readouterr().err


def test_a_parameter_out_of_its_choices_is_refused():
    with pytest.raises(ConfigError, match=r"html.extractor=lynx"):
        build_recipe([{"html": {"extractor": "lynx"}}])


def test_cleaned_pages_are_the_same_on_any_number_of_workers(tmp_path, pages):
    one, two = prepared(tmp_path, "one", ["html"]), prepared(tmp_path, "two", ["html"], workers=2)
    assert (one / "train.bin").read_bytes() == (two / "train.bin").read_bytes()
    assert Card.load(one).cleaning == Card.load(two).cleaning

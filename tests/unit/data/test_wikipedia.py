"""A dump's articles become text; redirects and other namespaces are left out, and a dump cut short is noticed."""

import bz2
import gzip
import io

import pytest
from support.raw_corpora import DUMP_HEAD, DUMP_TAIL, wiki_page

from megatrain.config import DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.corpus.decoding import decode
from megatrain.data.corpus.record import BadRecordError, Policy
from megatrain.data.corpus.sources import open_source
from megatrain.data.corpus.wikipedia import DumpError, read_dump, wikitext_to_text
from megatrain.data.preparation import prepare
from megatrain.errors import DataError

PAGES = [
    wiki_page("Apple", "An '''apple''' is a [[fruit]] & more.", 1),
    wiki_page("Pomme", "#REDIRECT [[Apple]]", 2, redirect=True),
    wiki_page("Talk:Apple", "I disagree.", 3, namespace=1),
    wiki_page("苹果", "'''苹果'''是[[水果|一种水果]]。", 4),
]


def records(text, limit=1000):
    return list(read_dump(io.BytesIO(text.encode()), "a.xml", limit))


def texts(found):
    return [decode(one, Policy("text", "refuse")).text for one in found if not one.left_out]


def test_articles_are_read_with_their_titles_and_others_left_out_by_reason():
    found = records(DUMP_HEAD + "".join(PAGES) + DUMP_TAIL)
    assert texts(found) == ["An apple is a fruit & more.", "苹果是一种水果。"]
    assert [one.left_out for one in found] == [None, "redirect", "other_namespace", None]
    assert found[3].id == "4" and found[3].where == "a.xml, page '苹果'"
    assert found[0].metadata == {"title": "Apple", "date": "2026-11-01T00:00:00Z"}


def test_a_page_beyond_the_limit_is_oversized_and_the_next_is_read():
    found = records(DUMP_HEAD + wiki_page("Long", "x" * 1500) + wiki_page("Short", "x" * 900) + DUMP_TAIL)
    assert [(one.where, one.oversized) for one in found] == [
        ("a.xml, page 'Long'", True),
        ("a.xml, page 'Short'", False),
    ]


def test_of_several_revisions_the_last_is_read():
    first, rest = wiki_page("A", "old").split("    </revision>\n")
    newer = "    <revision><text>new</text></revision>\n"
    assert texts(records(DUMP_HEAD + first + "    </revision>\n" + newer + rest + DUMP_TAIL)) == ["new"]


def test_wherever_a_dump_is_cut_it_is_noticed():
    whole = (DUMP_HEAD + "".join(PAGES) + DUMP_TAIL).rstrip("\n")
    for cut in range(0, len(whole), 7):
        with pytest.raises(DumpError):
            records(whole[:cut])
    with pytest.raises(DumpError, match=r"line \d+, column \d+"):
        records(DUMP_HEAD + PAGES[0] + PAGES[1][:60])


def test_entities_cannot_be_defined():
    bomb = '<!DOCTYPE mediawiki [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>\n'
    (found,) = records(bomb + DUMP_HEAD + wiki_page("A", "x") + DUMP_TAIL)
    assert found.problem.kind == "not_a_dump" and "it defines entities" in found.problem.message


@pytest.mark.parametrize("content, message", [("<feed></feed>", "root is <feed>"), ("no xml", "syntax error")])
def test_another_xml_is_a_bad_record(tmp_path, content, message):
    (tmp_path / "a.xml").write_text(content)
    (found,) = open_source(DataConfig(name="d", paths=[str(tmp_path)])).records()
    assert found.problem.kind == "not_a_dump" and message in found.problem.message


@pytest.mark.parametrize(
    "wikitext, text",
    [
        ("{{Infobox|a={{b|c}}}}\nText{{cite}}.<ref>A book</ref><ref name=a />", "Text."),
        ("[[File:A.jpg|thumb|A ''caption'' with [[link]].]]Text", "Text"),
        ("See [[a b|the thing]], [[c]]s and [http://x.example a page].", "See the thing, cs and a page."),
        ("[[Category:Towns]]Text[[de:Stadt]][[分类:城市]]", "Text"),
        ("[[wikt:cat|cat]] and [[Re:Zero]]", "cat and Re:Zero"),
        ("A [[:Category:Towns|town]], [[:File:A.jpg]]", "A town, File:A.jpg"),
        ("Old [[image:A.jpg|thumb|x]]names[[圖像:B.jpg]]", "Old names"),
        ("[[2001: A Space Odyssey]]", "2001: A Space Odyssey"),
        ('Before\n{| class="wikitable"\n|-\n! a !! b\n|-\n| 1 || 2\n|}\nAfter', "Before\n\nAfter"),
        ("== Head ==\nText <!-- hidden -->more\n__NOTOC__", "Head\nText more"),
        ("'''b''' ''i'' &amp; &eacute; <b>x</b>", "b i & é x"),
        ("unclosed {{ and [[ and ''' stay", "unclosed {{ and [[ and ''' stay"),
    ],
)
def test_wikitext_becomes_text(wikitext, text):
    assert wikitext_to_text(wikitext) == text


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("#REDIRECT [[B]]", True),
        ("#redirect: [[B#Part]] from a move\n{{R from move}}", True),
        ("\n#REDIRECTION [[B]]", True),
        ("#Weiterleitung [[B]]", True),
        ("#重定向[[B]]\n[[分类:城市]]<!-- a\nnote -->", True),
        ("#PATRZ TAM [[B|b]]\n\n{{S}}", True),
        ("#First [[B]] and more", False),
        ("#First [[B]]\n#Second [[C]]", False),
        ("# [[B]]", False),
        ("Text\n#REDIRECT [[B]]", False),
    ],
)
def test_a_page_whose_text_is_a_redirect_is_left_out(text, is_one):
    (found,) = records(DUMP_HEAD + wiki_page("A", text) + DUMP_TAIL)
    assert found.left_out == ("redirect" if is_one else None)


def test_a_page_nested_too_deeply_is_a_bad_record():
    for text in ("{{" * 3000 + "a" + "}}" * 3000, "{{{" * 3000 + "}}}" * 3000):
        (found,) = records(DUMP_HEAD + wiki_page("A", text) + DUMP_TAIL, limit=10**6)
        with pytest.raises(BadRecordError, match="nested too deeply") as caught:
            decode(found, Policy("text", "refuse"))
        assert (caught.value.problem.kind, caught.value.id) == ("wikitext", "1")


def test_dumps_of_any_compression_give_the_same_dataset_on_any_number_of_workers(tmp_path, monkeypatch):
    articles = [
        wiki_page(f"Title {i}", f"The '''article''' {i} says [[word|{'words ' * (i % 9)}]].", i) for i in range(120)
    ]
    dump = (DUMP_HEAD + "".join([*PAGES, *articles]) + DUMP_TAIL).encode()
    streams = [dump[at : at + 5000] for at in range(0, len(dump), 5000)]  # a multistream dump
    ways = [("a.xml", dump), ("a.xml.bz2", b"".join(map(bz2.compress, streams))), ("a.XML.gz", gzip.compress(dump))]
    monkeypatch.setattr("megatrain.data.corpus.pipeline.CHUNK_RECORDS", 11)
    found = []
    for number, (name, content) in enumerate(ways):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(content)
        data = DataConfig(name=f"d{number}", dir=str(tmp_path), paths=[str(folder)], workers=1 + number % 2)
        prepared = prepare(PrepareConfig(data=data, tokenizer=TokenizerConfig(vocab_size=400)))
        counts = Card.load(prepared).counts
        assert (counts["kind_wikipedia"], counts["left_out"], counts["left_out_redirect"]) == (122, 2, 1)
        found.append((prepared / "train.bin").read_bytes())
    assert len(set(found)) == 1


def test_a_compressed_dump_that_is_cut_short_is_refused_by_name(tmp_path):
    whole = bz2.compress((DUMP_HEAD + "".join(PAGES * 300) + DUMP_TAIL).encode())
    cut = DUMP_HEAD + "".join(PAGES * 300)
    for name, content in (
        ("a.xml.bz2", whole[:-20]),
        ("b.xml", DUMP_HEAD.encode()),
        ("c.xml", b""),
        ("d.xml", cut.encode()),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: cut short or damaged"):
            list(open_source(DataConfig(name="d", paths=[str(tmp_path / name)])).records())
    with pytest.raises(
        DataError, match=r"d.xml: cut .* \(no element .*; the last whole record: .*d.xml, page '苹果'\)"
    ):
        list(open_source(DataConfig(name="d", paths=[str(tmp_path / "d.xml")])).records())


def test_a_dump_names_its_own_namespaces_of_files_and_categories():
    names = (
        '<namespace key="6" case="first-letter">Datei</namespace><namespace key="14">Kategorie &amp; Art</namespace>'
    )
    names += '<namespace key="4">Wikipedia</namespace>'
    head = DUMP_HEAD.replace("<namespaces>", f"<namespaces>{names}")
    text = "[[Datei:A.jpg|mini|Bild]]Eine [[Wikipedia:Stadt|Stadt]].[[kategorie_&_Art:Ort]]"
    assert texts(records(head + wiki_page("Stadt", text) + DUMP_TAIL)) == ["Eine Stadt."]

"""Wikitext that the parser would need hours for, or die of, is a bad record at once."""

import pytest

from megatrain.data.corpus.record import Problem
from megatrain.data.corpus.wikipedia import wikitext_to_text
from megatrain.data.corpus.wikitext_cost import MAX_EQUALS, what_is_too_slow


@pytest.mark.parametrize(
    "piece",
    [
        *("<b>", "<ref>", "<nowiki>", "<pre>\n", "<b a=b ", "<!--", "{{a|", "{{{a|", "{{#if:a|b{{{c|", "[[a|", "{|\n"),
        *("[http://a ", "[//a ", "[mailto:a ", "[[a|{{b|", "{|\n|<i>\n", "<div>a</span>", "{{a|b]]", "<ref>a</b>"),
    ],
)
def test_a_page_that_repeats_what_is_never_closed_is_bad_at_once(piece):
    found = wikitext_to_text("Text. " + piece * 100_000)
    assert isinstance(found, Problem) and found.kind == "wikitext" and "never closed" in found.message


def test_a_heading_of_many_equals_signs_is_bad_instead_of_a_stack_overflow():
    assert isinstance(found := wikitext_to_text("a\n" + "= " * 100_000), Problem)
    assert found.message == f"a heading has 100000 runs of equals signs, more than {MAX_EQUALS}"
    assert isinstance(wikitext_to_text("= " * 4000), str)


@pytest.mark.parametrize(
    "piece",
    [
        *("<b>a</b> ", "<br>", "<li>a", "<ref name=a /> ", "{{a|{{{b|{{c}}}}}}} ", "[[a|b [[c]]]] ", "[http://a b] "),
        *(
            "{|\n|-\n| a || b\n|}\n",
            "<!-- <b> {{ -->",
            "<nowiki><b>{{[[a|</nowiki>",
            "<math>{{a}+{{b}</math>",
            "[http://a\n",
        ),
        *("== a ==\n", "{{a|b=|}}\n", "<SYNTAXHIGHLIGHT lang=c><b></syntaxhighlight>", "<span\nid='a'>b</span >\n"),
    ],
)
def test_pages_of_ordinary_markup_are_parsed_however_long(piece):
    assert what_is_too_slow(piece * 20_000) is None


def test_some_tags_and_templates_of_a_long_page_may_be_never_closed():
    assert what_is_too_slow(("<p>" + "Words of a paragraph. " * 20 + "\n") * 200) is None
    assert what_is_too_slow("{{a|<b>" * 20 + "word " * 40_000) is None

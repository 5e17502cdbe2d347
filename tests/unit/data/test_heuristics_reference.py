"""The steps give each document the verdict, and the text, of datatrove's filters with their default English words."""

import random
import sysconfig
from pathlib import Path

import pytest

from megatrain.data.corpus.document import Document
from megatrain.data.corpus.splitting import English, splitter
from megatrain.data.corpus.steps.c4 import C4Paragraphs, C4Quality
from megatrain.data.corpus.steps.fineweb_quality import FinewebQuality
from megatrain.data.corpus.steps.gopher_quality import GopherQuality
from megatrain.data.corpus.steps.gopher_repetition import GopherRepetition

RULES = {
    **{"gopher_short_doc": "too_few_words", "gopher_long_doc": "too_many_words", "empty": "empty"},
    **{"gopher_below_avg_threshold": "short_words", "gopher_above_avg_threshold": "long_words"},
    **{"gopher_too_many_hashes": "hash_signs", "gopher_too_many_ellipsis": "ellipses"},
    **{"gopher_too_many_bullets": "bullet_lines", "gopher_too_many_end_ellipsis": "ellipsis_lines"},
    **{"gopher_below_alpha_threshold": "few_alphabetic_words", "gopher_enough_stop_words": "few_stop_words"},
    **{"dup_para_frac": "duplicate_paragraphs", "dup_para_char_frac": "duplicate_paragraph_characters"},
    **{"dup_line_frac": "duplicate_lines", "dup_line_char_frac": "duplicate_line_characters"},
    **{f"top_{n}_gram": f"top_{n}_gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"duplicate_{n}_grams" for n in range(5, 11)},
    **{"line_punct_ratio": "few_ended_lines", "short_line_ratio": "short_lines", "char_dup_ratio": "duplicate_lines"},
    **{"list_ratio": "line_breaks", "< 3 paragraphs": "few_paragraphs"},
    **{name: name for name in ("lorem_ipsum", "curly_bracket", "too_few_sentences")},
}
"""datatrove's name of each rule, and ours."""


def real_texts():
    """Return Python sources, and texts and manuals that packages carry."""
    paths = sysconfig.get_paths()
    files = sorted(Path(paths["stdlib"]).glob("*.py"))[::6]
    for ending in ("md", "rst", "txt"):
        files += sorted(Path(paths["purelib"]).glob(f"**/*.{ending}"))[::5][:25]
    return [file.read_text(errors="replace")[:8000] for file in files]


def made_texts(real):
    """Return paragraphs put together, repeated phrases, lists, and characters and marks of all kinds."""
    draw = random.Random(3)
    paragraphs = [part for text in real for part in text.split("\n\n") if len(part) > 100]
    words = " ".join(paragraphs[:200]).split()

    def phrase(most):
        return " ".join(draw.sample(words, draw.randrange(2, most)))

    def letter():
        return chr(draw.choice([draw.randrange(32, 127), 97, 98, 32, 10, draw.randrange(160, 0x2FFF), 0x4E2D, 0x1F600]))

    made = []
    for _ in range(40):
        made.append("\n\n".join(draw.sample(paragraphs, draw.randrange(1, 12))))
        made.append("\n".join(draw.choice(paragraphs[:20]) for _ in range(draw.randrange(1, 8))))
        few = draw.sample(words, draw.randrange(3, 60))
        ends = [" ", " ", ". ", "\n", "... ", "\n- ", " # "]
        made.append("".join(draw.choice(few) + draw.choice(ends) for _ in range(draw.randrange(20, 300))))
        again = [phrase(12) for _ in range(5)]
        made.append(" ".join(draw.choice([draw.choice(again), phrase(12)]) for _ in range(draw.randrange(3, 40))))
        made.append("".join(letter() for _ in range(draw.randrange(900))))
    return [*made, "", " ", "\n\n", "…", "Lorem ipsum dolor sit amet, and it goes on.\n" * 6]


@pytest.fixture(scope="module")
def texts():
    real = real_texts()
    return real + made_texts(real)


LINES = ("max_duplicate_paragraphs", "max_duplicate_paragraph_characters", "max_duplicate_lines",
         "max_duplicate_line_characters")  # fmt: skip
PARTS = ("dup_para_frac", "dup_para_char_frac", "dup_line_frac", "dup_line_char_frac")
CASES = {
    "gopher quality": (GopherQuality(), "GopherQualityFilter", {}),
    "gopher repetition": (GopherRepetition(), "GopherRepetitionFilter", {}),
    "gopher repetition of words": (
        GopherRepetition(**dict.fromkeys(LINES)),
        "GopherRepetitionFilter",
        dict.fromkeys(PARTS),
    ),
    "gopher repetition of long n-grams": (
        GopherRepetition(**dict.fromkeys(LINES), max_top_2_gram=None, max_top_3_gram=None, max_top_4_gram=None),
        "GopherRepetitionFilter",
        {**dict.fromkeys(PARTS), "top_n_grams": ()},
    ),
    "c4": (C4Quality(), "C4QualityFilter", {}),
    "c4 as fineweb": (C4Quality(end_punctuation=[]), "C4QualityFilter", {"filter_no_terminal_punct": False}),
    "mc4 paragraphs": (C4Paragraphs(), "C4ParagraphFilter", {}),
    "fineweb": (FinewebQuality(), "FineWebQualityFilter", {}),
    "fineweb's line breaks": (
        FinewebQuality(min_ended_lines=0.0, max_short_lines=None, max_duplicate_characters=None),
        "FineWebQualityFilter",
        {"line_punct_thr": 0.0, "short_line_thr": 2.0, "char_duplicates_ratio": 2.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_step_agrees_with_datatrove_document_by_document(case, texts):
    from datatrove.data import Document as Theirs
    from datatrove.pipeline import filters

    step, name, settings = CASES[case]
    reference = getattr(filters, name)(**settings)
    verdicts = set()
    for number, text in enumerate(texts):
        theirs, ours = Theirs(text=text, id=""), Document(text, "")
        found = reference.filter(theirs)
        removal = step.apply(ours)
        expected = None if found is True else RULES[found[1]]
        assert (removal.rule if removal else None) == expected, (number, text[:200])
        if expected is None:
            assert ours.text == theirs.text, (number, text[:200])
        verdicts.add(expected)
    assert None in verdicts and len(verdicts) > 1


def hard_texts():
    """Return spaCy's exceptions and marks in any order, with whitespace of all kinds, and long runs."""
    draw = random.Random(5)
    exceptions = sorted(rule for rule in English()._tokenizer.rules if len(rule) > 1 and not rule.isspace())
    spaces = [" ", " ", "  ", "\n", " \n ", "\t", "\xa0", "\u3000", "\u2028", "\x85", "\x1c", "", ""]
    marks = list("()[]:;.-_'\"/<>=8oDpO\u2019\u2018°abm")
    pieces = [
        "foo",
        "3.5",
        "km",
        "(x",
        "$5",
        "don't",
        "U.S.",
        "a.m.",
        "'s",
        "http://a.b/c?d=e",
        "x@y.org",
        "...",
        "中文",
    ]
    for _ in range(200):
        yield "".join(draw.choice([*draw.choices(exceptions, k=20), *spaces, *marks]) for _ in range(60))
        yield "".join(draw.choice([*marks, *spaces]) for _ in range(draw.randrange(1, 400)))
        yield "".join(draw.choice([*pieces, *spaces]) for _ in range(draw.randrange(1, 200)))
    yield from ("a" * 20_000, "!" * 2000, "a." * 1000, "aGVsbG8rL29" * 500, "-" * 500 + " ab", "我" * 1000, "", " ")


def test_words_and_sentences_are_spacys(texts):
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    reference, ours = load_word_tokenizer("en"), splitter("en")
    for text in [*texts, *hard_texts()]:
        assert ours.words(text) == reference.word_tokenize(text), text[:300]
        if len(text) < 2000:
            assert ours.sentences(text) == max(1, len(reference.span_tokenize(text))), text


@pytest.mark.parametrize("text", ["8:( ))", "8:(( (y", "8>:( :(x", ":Lovin \u2019\u2019x"])
def test_an_exception_across_two_runs_hides_one_inside_as_in_spacy(text):
    from datatrove.utils.word_tokenizers import load_word_tokenizer

    ours = splitter("en")
    assert ours.words(text) == load_word_tokenizer("en").word_tokenize(text)
    assert ours.words(text) != [word for run in text.split() for word in ours.words(run)]


def test_words_do_not_depend_on_what_was_split_before(monkeypatch):
    monkeypatch.setattr("megatrain.data.corpus.splitting._MOST_RUNS", 5)
    fresh, ours = English(), splitter("en")
    for text in ["It's IS_ALPHA. No?", "a IS_ALPHA.", "one two three four", "six seven: eight nine", "a one IS_ALPHA"]:
        assert fresh.words(text) == ours.words(text)
    assert fresh.words("a IS_ALPHA. b") == ["a", "IS_ALPHA", ".", "b"]
    assert len(fresh._runs) < 12
    fresh.words("x" * 100)
    assert max(map(len, fresh._runs)) <= 64

"""The steps that repair Unicode and identify languages."""

import sys

import pytest

from megatrain.data.corpus.document import Document
from megatrain.data.corpus.recipe import build_recipe
from megatrain.data.corpus.steps.personal_data import _phonenumbers
from megatrain.data.corpus.steps.unicode import _ftfy
from megatrain.errors import ConfigError, EnvironmentFault


def cleaned(text, step):
    (built,) = build_recipe([step])
    document = Document(text, "d")
    removal = built.apply(document)
    return document.text if removal is None else removal.rule


CHINESE = "“你好”，世界！（测试）：１２３；《书》、……\u3000全角空格"


@pytest.mark.parametrize(
    "before, after",
    [
        ("cafÃ© naÃ¯ve", "café naïve"),
        ("itâ€™s", "it’s"),
        ("“curly” ‘quotes’ ﬁne &amp; well", "“curly” ‘quotes’ ﬁne &amp; well"),
        (CHINESE, CHINESE),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("no\u00a0break thin\u2009space", "no break thin space"),
        ("e\u0301", "é"),
        ("a\n\n\n \n\nb", "a\n\nb"),
        ("می\u200cخواهم 👩\u200d👧", "می\u200cخواهم 👩\u200d👧"),
        ("plain ASCII\n\nstays", "plain ASCII\n\nstays"),
    ],
)
def test_broken_text_is_repaired_and_right_text_stays(before, after):
    assert cleaned(before, "unicode") == after
    assert cleaned(after, "unicode") == after


def test_emoji_go_where_asked():
    text = "well done 👍🏽 👩\u200d👧 ⭐ 中文🇨🇳."
    assert cleaned(text, {"unicode": {"remove_emoji": True}}) == "well done    中文."
    assert cleaned(text, "unicode") == text


ENGLISH = "The quick brown fox jumps over the lazy dog while the sun sets slowly behind the old village church."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, während die Sonne hinter der Kirche untergeht."
CHINESE_TEXT = "今天天气很好，我们一起去公园散步，看到很多孩子在湖边放风筝，老人们在树下下棋聊天。"


def test_languages_are_identified_and_kept_by_code():
    (step,) = build_recipe([{"language": {"keep": ["en", "zh"]}}])
    for text, language, rule in (
        (ENGLISH, "en", None),
        (CHINESE_TEXT, "zh", None),
        (GERMAN, "de", "language_de"),
    ):
        document = Document(text, "d")
        removal = step.apply(document)
        assert (document.language, removal and removal.rule) == (language, rule)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"language": {"keep": ["en", "english"]}},
            r"language.keep: unknown english; codes that would work: ace, .*zh",
        ),
        ({"language": {"keep": ["yue"]}}, r"language.keep: unknown yue; give zh for yue; codes"),
        ({"personal_data": {"regions": ["US", "UK"]}}, r"personal_data.regions: unknown UK; .* FR, .*GB"),
    ],
)
def test_unknown_codes_are_refused_before_anything_is_read(step, message):
    with pytest.raises(ConfigError, match=message):
        build_recipe([step])


@pytest.mark.parametrize(
    ("step", "library", "without"),
    [
        ("language", "py3langid.langid", None),
        ("unicode", "ftfy", {"repair_encoding": False}),
        ("personal_data", "phonenumbers", {"kinds": ["email"]}),
    ],
)
def test_a_missing_library_is_noticed_before_anything_is_read(step, library, without, monkeypatch):
    _ftfy.cache_clear()
    _phonenumbers.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(EnvironmentFault, match=rf"{step} needs the library {library}: pip install '\.\[corpus\]'"):
        build_recipe([step])
    if without:
        build_recipe([{step: without}])


def test_a_document_of_no_clear_language_is_removed():
    assert cleaned("x1 q", {"language": {"keep": ["en"], "min_score": 0.999999}}).endswith(
        ("uncertain_language", "language_" + cleaned("x1 q", {"language": {"keep": ["vo"]}}).removeprefix("language_"))
    )
    assert cleaned("x1 q", "language") == "x1 q"


def test_the_middle_of_a_long_document_decides():
    menu = "Startseite Über uns Kontakt Impressum Datenschutz Anmelden " * 10
    assert cleaned(menu + ENGLISH * 100 + menu, {"language": {"keep": ["en"]}}).startswith("Startseite")

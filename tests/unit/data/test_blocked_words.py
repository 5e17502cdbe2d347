"""Documents with a word of a list go: the verdicts are datatrove's, which follows C4's program."""

import json
import random

import pytest

from megatrain.data.corpus.document import Document
from megatrain.data.corpus.recipe import build_recipe, new_reports, run_recipe
from megatrain.data.corpus.steps.blocked_words import _EXEMPT, _LISTS, LANGUAGES, BlockedWords
from megatrain.errors import ConfigError, DataError

LISTS = json.loads(_LISTS.read_text(encoding="utf-8"))["words"]


@pytest.fixture
def reference(monkeypatch, tmp_path):
    """Return datatrove's filter, with our lists in the place of the files that it would download.

    They are in small letters: it compares with text in small letters, so it would never find the others.
    """
    from datatrove.data import Document as TheirDocument
    from datatrove.pipeline.filters.c4_filters import C4BadWordsFilter

    def local(url, **_):
        language = url.rpartition("/")[2]
        (tmp_path / language).write_text("\n".join(LISTS[language]).lower() + "\n", encoding="utf-8")
        return str(tmp_path / language)

    monkeypatch.setattr("datatrove.pipeline.filters.c4_filters.cached_asset_path_or_download", local)
    theirs = C4BadWordsFilter()
    return lambda text, language: theirs.filter(TheirDocument(text, "id", metadata={"language": language})) is True


def removed(text, **parameters):
    return BlockedWords(**parameters).apply(Document(text, "id"))


def test_every_language_of_c4_has_a_list():
    assert set(LANGUAGES) == set(LISTS) and all(LISTS.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_verdicts_are_datatroves(reference, language):
    draw = random.Random(language)
    listed = LISTS[language]
    glue = [" ", "", ".", "\n", "-", "_", "a", "9", "x ", " y", "的", "é", "'"]
    plain = ["the house", "la maison", "房子很大", "дом", "घर", "บ้าน", "性格", "Essex", "classic", "assassin"]
    verdicts = []
    for _ in range(400):
        word = draw.choice(listed) if draw.random() < 0.9 else draw.choice(plain)
        if draw.random() < 0.3:
            word = draw.choice(word.split())  # a part of a phrase
        if draw.random() < 0.3:
            word = word.upper() if draw.random() < 0.5 else word.title()
        around = draw.choice(glue), draw.choice(glue)
        text = f"{draw.choice(plain)}{around[0]}{word}{around[1]}{draw.choice(plain)}"
        verdicts.append((text, reference(text, language), removed(text, language=language) is None))
    assert [row for row in verdicts if row[1] != row[2]] == []
    assert {row[1] for row in verdicts} == {True, False}


def test_entries_in_capitals_are_found_too():
    assert "Puta" in LISTS["es"] and removed("qué puta cosa", language="es").detail == "has puta"


def test_what_c4_exempts_stays():
    for word in _EXEMPT:
        assert any(word in words for words in LISTS.values()), word
    assert removed("这个性格测试很有意思", language="zh") is None
    assert removed("女の子", language="ja") is None


def test_a_list_of_ones_own_is_read_from_a_file(tmp_path):
    (tmp_path / "words.txt").write_text("# mine\nGrail\nholy hand\n\n", encoding="utf-8")
    (tmp_path / "words.json").write_text('["圣杯"]', encoding="utf-8")
    own, chinese = str(tmp_path / "words.txt"), str(tmp_path / "words.json")
    assert removed("It is the grail.", path=own).detail == "has grail"
    assert removed("A HOLY HAND of it", path=own).detail == "has holy hand"
    assert removed("grails, unholy hands, mine", path=own) is None
    assert removed("寻找圣杯的人", path=chinese) is None, "in spaced text a word stands on its own"
    assert removed("寻找圣杯的人", path=chinese, language="zh").detail == "has 圣杯"
    before = BlockedWords(path=own).settings()
    (tmp_path / "words.txt").write_text("other\n", encoding="utf-8")
    assert BlockedWords(path=own).settings() != before
    assert removed("It is the grail.", path=own) is None


def test_removals_are_counted_and_sampled_and_other_languages_stay(tmp_path):
    (tmp_path / "words.txt").write_text("grail\n", encoding="utf-8")
    recipe = build_recipe([{"blocked_words": {"path": str(tmp_path / "words.txt")}}])
    reports = new_reports(recipe)
    texts = [("A grail.", None), ("A cup.", "en"), ("Ein grail.", "de"), ("The grail.", "en")]
    kept = [run_recipe(recipe, Document(text, text, language=language), reports, 1) for text, language in texts]
    assert kept == [False, True, True, False]
    assert reports[0].rules == {"blocked_word": 2}
    assert {example["before"] for example in reports[0].examples} == {"A grail.", "The grail."}


def test_mistakes_are_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"blocked_words.path: .*no.txt cannot be read .*; give a file with a word a line"
    ):
        build_recipe([{"blocked_words": {"path": str(tmp_path / "no.txt")}}])
    with pytest.raises(ConfigError, match=r"blocked_words.language=xx has no list; give one of ar, cs"):
        build_recipe([{"blocked_words": {"language": "xx"}}])
    (tmp_path / "words.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"words.json: not an array of texts"):
        removed("text", path=str(tmp_path / "words.json"))


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", "# nothing\n\n"), ("a.json", "[]")])
def test_a_list_without_entries_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}: has no entry"):
        removed("text", path=str(tmp_path / name))


def test_an_entry_is_found_however_its_accents_are_spelled(tmp_path):
    (tmp_path / "words.txt").write_text("e\u0301te\u0301\n", encoding="utf-8")  # a letter and its accent apart
    assert removed("un \u00e9t\u00e9 chaud", path=str(tmp_path / "words.txt")).detail == "has \u00e9t\u00e9"

"""A recipe runs its steps in order, reports what each did, and refuses what it cannot do by its place in the list."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from megatrain.config import CleanConfig, DataConfig, PrepareConfig, TokenizerConfig
from megatrain.data.card import Card
from megatrain.data.corpus.document import Document, Removal, Step
from megatrain.data.corpus.recipe import add_reports, build_recipe, new_reports, run_recipe
from megatrain.data.preparation import prepare
from megatrain.errors import ConfigError


@dataclass(frozen=True)
class Upper(Step):
    name: ClassVar[str] = "upper"

    def apply(self, document):
        document.text = document.text.upper()


@dataclass(frozen=True)
class NoDigits(Step):
    name: ClassVar[str] = "no_digits"

    def apply(self, document):
        return Removal("digit", "has a digit") if any(map(str.isdigit, document.text)) else None


def test_each_step_sees_what_the_one_before_left():
    recipe = (Upper(), NoDigits(), *build_recipe([{"length": {"min_characters": 4}}]))
    reports = new_reports(recipe)
    kept = [
        run_recipe(recipe, document, reports, seed=1)
        for document in [Document("häuser", "a"), Document("h4user", "b"), Document("DOG", "c"), Document("LOUD", "d")]
    ]
    assert kept == [True, False, False, True]
    upper, digits, length = reports
    assert (upper.documents_in, upper.documents_out, upper.changed) == (4, 4, 2)
    assert (upper.bytes_in, upper.bytes_out) == (7 + 6 + 3 + 4, 7 + 6 + 3 + 4)
    assert (digits.documents_in, digits.documents_out, digits.rules) == (4, 3, {"digit": 1})
    assert (length.documents_in, length.documents_out, length.rules) == (3, 2, {"too_short": 1})
    assert digits.examples[0]["before"] == "H4USER" and digits.examples[0]["detail"] == "has a digit"
    assert {example["after"] for example in upper.examples} == {"HÄUSER", "H4USER"}


def test_examples_and_figures_do_not_depend_on_how_documents_are_divided():
    documents = [Document("x" * (i % 9) + str(i) * (i % 2), f"id{i}") for i in range(200)]
    recipe = (NoDigits(), *build_recipe([{"length": {"min_characters": 3}}]))

    def reported(sizes):
        total = new_reports(recipe)
        at = 0
        for size in sizes:
            part = new_reports(recipe)
            for document in documents[at : at + size]:
                run_recipe(recipe, document, part, seed=7)
            add_reports(total, part)
            at += size
        return total

    whole = reported([200])
    assert whole == reported([1, 50, 0, 149]) == reported([100, 100])
    assert len(whole[0].examples) == len(whole[1].examples) == 5


@pytest.mark.parametrize(
    "steps, message",
    [
        (["lenght"], r"clean.steps\[0\]: unknown step lenght; did you mean length"),
        (["length", {"length": {"max": 3}}], r"clean.steps\[1\]: length has no parameter max; did you mean max_char"),
        ([{"length": {"min_characters": "a"}}], r"length.min_characters=a: expected a whole number, given text"),
        ([{"length": {"min_characters": -1}}], r"clean.steps\[0\]: length.min_characters=-1 is out of range: .* 0"),
        ([{"length": {"min_characters": None}}], r"length.min_characters=None: expected a whole number"),
        ([{"length": 3}], r"clean.steps\[0\]: .* expected the name of a step, or {name: {parameter: value}}"),
        ([3], r"clean.steps\[0\]: 3: expected the name of a step"),
        (
            [{"length": {"min_characters": 10, "max_characters": 5}}],
            r"\[0\]: length.min_characters=10 is above length.max",
        ),
        ([{"gopher_quality": {"max_words": 10}}], r"gopher_quality.min_words=50 is above gopher_quality.max_words=10"),
        (
            [{"language": {"keep": ["en", None]}}],
            r"language.keep=.*: expected a list of texts .* given a list with null",
        ),
        ([{"c4_quality": {"end_punctuation": [None]}}], "c4_quality.end_punctuation=.* given a list with null"),
        ([{"gopher_quality": {"stop_words": [None]}}], "gopher_quality.stop_words=.* given a list with null"),
        ([{"language": {"keep": ["en", False]}}], r"language.keep=.* given a list with a boolean \(False\)"),
        ([{"length": {}, "upper": {}}], r"clean.steps\[0\]: .* expected the name of a step"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_place(steps, message):
    with pytest.raises(ConfigError, match=message):
        build_recipe(steps)


def prepared(tmp_path, name, steps, **also):
    data = DataConfig(name=name, dir=str(tmp_path / "out"), kind="files", paths=[str(tmp_path / "in")], workers=1)
    return prepare(PrepareConfig(data=data, clean=CleanConfig(steps=steps), tokenizer=TokenizerConfig(vocab_size=400)))


def test_prepare_cleans_counts_and_keeps_examples(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / "in" / f"{i}.txt").write_text("word " * i + "end.")
    steps = [{"length": {"min_characters": 50, "max_characters": 150}}]
    folder = prepared(tmp_path, "d", steps)
    card = Card.load(folder)
    kept = [i for i in range(40) if 50 <= 5 * i + 4 <= 150]
    assert sum(split.documents for split in card.splits.values()) == len(kept)
    assert card.counts["cleaned_away"] == 40 - len(kept)
    (length,) = card.cleaning
    assert (length["documents_in"], length["documents_out"]) == (40, len(kept))
    assert length["rules"] == {"too_short": 10, "too_long": 10}
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert len(examples) == 10 and {example["step"] for example in examples} == {"length"}
    assert "length: 40 documents, 20 removed (too long 10, too short 10)" in capsys.readouterr().err
    assert prepared(tmp_path, "d", [{"length": {"max_characters": 150, "min_characters": 50}}]) == folder
    with pytest.raises(ConfigError, match=r"clean.steps \(was "):
        prepared(tmp_path, "d", ["length"])


def test_a_dataset_from_before_recipes_is_still_the_same(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("words and words and words")
    folder = prepared(tmp_path, "d", [])
    card = json.loads((folder / "card.json").read_text())
    del card["cleaning"], card["config"]["clean"]
    (folder / "card.json").write_text(json.dumps(card))
    prepared(tmp_path, "d", [])
    assert "already prepared" in capsys.readouterr().err

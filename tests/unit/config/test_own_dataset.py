"""A prepared dataset is a choice of `data`, by its name or its folder."""

import os
import re

import pytest

from megatrain.cli import parse
from megatrain.config.compose import compose
from megatrain.errors import ConfigError
from megatrain.verbs.start_checks import prepare_command
from megatrain.verbs.sweep_points import compose_points


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Two prepared datasets, one beside `data/`, and a folder of text."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data/mine", "data/code", "else/where/other", "cor pus"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / ("text.txt" if folder == "cor pus" else "card.json")).write_text("{}")
    return tmp_path


def data_of(verb, *words):
    data = compose(verb, list(words)).data
    return data.kind, data.dir, data.name


def refusal(*words, verb="train"):
    with pytest.raises(ConfigError) as caught:
        compose(verb, parse([verb, *words]).overrides)
    return str(caught.value)


@pytest.mark.parametrize("verb", ["train", "layouts"])
def test_a_name_or_a_folder_chooses_a_prepared_dataset(verb, place):
    same = ("files", "data", "mine")
    assert data_of(verb, "data=files", "data.name=mine") == same
    for words in (["data=mine"], ["data=data/mine"], ["data=./data/mine/"], ["data=code", "data=mine"]):
        assert data_of(verb, *words) == same, words
    assert data_of(verb, "data=mine", "data.dir=data", "data.name=mine") == same
    assert data_of(verb, "data=else/where/other") == ("files", "else/where", "other")
    assert data_of(verb, "data=other", "data.dir=else/where") == ("files", "else/where", "other")
    assert data_of(verb, f"data={place}/data/mine") == ("files", f"{place}/data", "mine")
    os.chdir(place / "data" / "mine")
    assert data_of(verb, "data=../mine") == ("files", "..", "mine")
    os.chdir(place / "data")
    assert data_of(verb, "data=mine") == ("files", ".", "mine")
    assert compose("train", ["model=tiny", "data=mine"]).run.name == "tiny-mine"


def test_a_choice_of_the_group_comes_before_a_dataset_of_its_name():
    assert data_of("train", "data=code")[0] == "code"
    assert data_of("train", "data=data/code") == ("files", "data", "code")
    assert data_of("train", "data=mine", "data=code", "data.name=x") == ("code", "data", "x"), "the last one counts"


def test_a_dataset_and_a_key_that_names_another_contradict_each_other():
    assert refusal("data=mine", "data.name=other") == (
        "data=mine is the dataset data/mine, but data.name=other names another; give one of them"
    )
    assert "but data.dir=data names another" in refusal("data=else/where/other", "data.dir=data")


def test_datasets_can_be_swept():
    points = compose_points(["model=tiny", "data=mine,else/where/other"])
    assert [(point.config.data.dir, point.config.data.name) for point in points] == [
        ("data", "mine"),
        ("else/where", "other"),
    ]


def test_what_is_no_dataset_is_refused_with_what_to_type():
    assert refusal("model=tiny", "data/mine") == (
        "data/mine is a dataset, not a run; to train on it: megatrain train data=data/mine model=tiny"
    )
    assert refusal("mine").endswith("to train on it: megatrain train data=mine")
    assert refusal("cor pus").endswith("; if it holds text, prepare it first: megatrain prepare 'cor pus'")
    assert refusal("cor pus/text.txt").endswith(
        "; if it is text, prepare it first: megatrain prepare 'cor pus/text.txt'"
    )
    assert refusal("data=cor pus") == (
        "data=cor pus is no prepared dataset; if it is text, prepare it first: megatrain prepare 'cor pus'"
    )
    assert refusal("data=data/mine", verb="prepare") == (
        "data=data/mine is a dataset that is prepared already; to train on it: megatrain train data=data/mine"
    )
    assert re.match("unknown choice data=none, and no dataset of that name is prepared: ", refusal("data=none"))


def test_the_command_that_prepares_it_again_names_its_kind():
    words = ["data=mine", "data.bos=true"]
    command = prepare_command(compose("train", words), words)
    assert command.startswith("megatrain prepare data.bos=true data=files ") and "data.name=mine" in command

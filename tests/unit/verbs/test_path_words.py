"""Paths on the command line and in path keys: home, odd characters, run folders."""

import os
import re
import shlex
import types
from pathlib import Path

import pytest
import yaml

from megatrain import cli
from megatrain.config import VERBS, walk
from megatrain.config.compose import compose, key_types, read_overrides
from megatrain.config.values import split_list
from megatrain.errors import ConfigError
from megatrain.verbs.path_checks import check_paths
from megatrain.verbs.path_words import expand_path
from megatrain.verbs.value_checks import check_values

ODD = ["lr=0.1", "path=x", "it's, (odd) \\ name", "[x]", "a,b", "{x}", "'q'", "${x}", "~", "x y", "-"]


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


def refusal(act, *arguments):
    with pytest.raises(ConfigError) as caught:
        act(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("name", ODD)
def test_an_existing_path_is_a_path_as_a_word_and_in_a_key(name):
    for folder in (Path("runs") / name, Path(name)):
        folder.mkdir(parents=True)
        if str(folder) not in ("~", "-", "path=x"):
            config = compose("inspect", cli.parse(["inspect", str(folder)]).overrides)
            assert config.path == str(folder)
            check_paths(config)
    assert compose("prepare", [f"data.dir=runs/{name}"]).data.dir == f"runs/{name}"
    assert compose("prepare", [f"data.paths=[runs/{name}]"]).data.paths == [f"runs/{name}"]


def test_a_word_that_is_an_override_stays_one(places):
    (places / "seed=3").mkdir()
    assert expand_path("train", ["seed=3"]) == ["seed=3"]
    assert expand_path("generate", ["runs/x", "seed=3"]) == ["path=runs/x", "seed=3"]
    assert expand_path("evaluate", ["split=train", "runs/x"]) == ["path=runs/x", "split=train"]
    assert expand_path("inspect", ["runs/lr=0.2"]) == ["path='runs/lr=0.2'"], "missing, but no key looks like that"
    assert expand_path("train", ["--config=x", "optim/lr=3"]) == ["--config=x", "optim/lr=3"]


@pytest.mark.parametrize("name", ODD)
def test_prepare_reads_the_paths_among_its_words(name, places):
    """They are data.paths of a dataset that has the folder's name; a key that is given stays."""
    folder = places / "in" / name
    folder.mkdir(parents=True)
    (folder / "b.jsonl.zst").touch()
    (places / "in" / "c.txt").touch()

    def read(*words):
        return compose("prepare", expand_path("prepare", words)).data

    data = read(f"in/{name}", "data.bos=true")
    assert (data.kind, data.name, data.paths, data.bos) == ("files", name, [f"in/{name}"], True)
    data = read("data=code", f"in/{name}/b.jsonl.zst")
    assert (data.kind, data.name, data.paths) == ("code", "b", [f"in/{name}/b.jsonl.zst"])
    data = read(f"in/{name}", "in/c.txt", "in/*.md", "data.name=all")
    assert (data.name, data.paths) == ("all", [f"in/{name}", "in/c.txt", "in/*.md"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["corpsu/x"],
            r"no file or folder corpsu/x \(looked for /.*/corpsu/x\); did you mean corpus/x\?.*prepare corpus/",
        ),
        (["tinystories"], r"did you mean data=tinystories\?"),
        (["corpus", "corpus/x"], "the dataset needs a name; add for example data.name=mine"),
        (["corpus/*"], "the dataset needs a name"),
        (["corpus", "data.paths=[x]"], "both name what to read"),
    ],
)
def test_words_that_prepare_cannot_read_are_refused(words, says, places):
    (places / "corpus" / "x").mkdir(parents=True)
    assert re.search(says, refusal(expand_path, "prepare", words))


@pytest.mark.parametrize(
    ("words", "write"),
    [
        (["data.paths=[a,", "b]"], "'data.paths=[a, b]'"),
        (["data.mixture={a:", "1,", "b:", "2}", "seed=1"], "'data.mixture={a: 1, b: 2}'"),
    ],
)
@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_a_list_that_the_shell_split_is_refused_with_its_quotes(verb, words, write):
    assert refusal(expand_path, verb, words) == f"the shell splits a list at its spaces: write {write}"
    assert expand_path("generate", ["path=x", "prompt=[a,", "b]=c"])[1:] == ["prompt=[a,", "b]=c"], "a prompt is prose"


def test_paths_that_the_data_does_not_read_are_refused():
    config = compose("prepare", ["data.paths=corpus"])
    assert "data=python_stdlib does not read it; add data=files" in refusal(check_values, config)


@pytest.mark.parametrize("verb", VERBS)
def test_in_every_path_key_a_leading_tilde_is_home(verb, places):
    keys = {name: f for name, f in walk(VERBS[verb]).items() if f.metadata.get("path")}
    assert {"data.dir", "data.paths", "run.dir", "checkpoint.resume", "path", "out"} & keys.keys()
    lists = [name for name, hint in key_types(VERBS[verb]).items() if hint == list[str]]
    given = [f"{name}=[~/x y,z]" if name in lists else f"{name}=~/x y" for name in keys]
    config = compose(verb, given)
    for name in keys:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        assert value == ([f"{places}/home/x y", "z"] if name in lists else f"{places}/home/x y")


def test_every_key_that_says_folder_or_path_is_marked_as_one():
    for verb, schema in VERBS.items():
        for name, f in walk(schema).items():
            if name.rpartition(".")[2] in ("dir", "path", "hf_path", "nvme_path", "paths", "out", "init_from"):
                assert f.metadata.get("path"), f"{verb} {name}"


def test_the_home_of_a_user_who_does_not_exist_is_refused_with_what_works():
    message = refusal(compose, "prepare", ["data.dir=~no_such_user/x"])
    assert message.startswith("data.dir=~no_such_user/x: there is no home folder for ~no_such_user; ")
    assert "./~no_such_user/x" in message
    assert compose("prepare", ["data.dir=./~no_such_user/x"]).data.dir == "./~no_such_user/x"
    assert compose("prepare", [f"data.dir=~{os.environ.get('USER', 'root')}/x"]).data.dir.startswith("/")


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("corpus (1).txt", ["corpus (1).txt"]),
        ("'a,b',\"(c)\"", ["a,b", "(c)"]),
        ("v[1,2]/x.txt, it's.txt", ["v[1,2]/x.txt", "it's.txt"]),
        (r"'it\'s, x', y", ["it's, x", "y"]),
        ("a(,b", ["a(", "b"]),
        ("'a' b, c=d", ["'a' b", "c=d"]),
        ("", []),
    ],
)
def test_a_list_of_texts_is_read_as_it_is_written(text, items):
    assert split_list(text) == items
    assert compose("prepare", [f"data.paths=[{text}]"]).data.paths == items
    assert compose("prepare", [f"data.paths='[{text}]'"]).data.paths == items, "quotes that the shell left"


def test_a_place_that_cannot_be_made_is_refused_before_anything_is(places):
    (places / "file").write_text("x")
    before = sorted(places.rglob("*"))
    for verb, words in {
        "prepare": ["data=files", "data.name=x", "data.paths=[file]", "data.dir=file/deep"],
        "export": ["path=file", "out=file/deep"],
        "report": ["path=.", "out=file/deep/x.html"],
    }.items():
        message = refusal(check_paths, compose(verb, words))
        assert re.search(r"(data.dir|out): .*cannot be made, because .*/file is a file", message)
    long = "x" * 300
    assert "File name too long" in refusal(check_paths, compose("prepare", [f"data.dir={long}"]))
    assert "no such file or folder" in refusal(check_paths, compose("inspect", [f"path={long}"]))
    assert sorted(places.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x" * 300, "run.name=x{40}... has 300 bytes, which is too long for the name of a folder; give at most 200"),
        ("é" * 150, "has 300 bytes"),
        ("a\tb", "cannot be the name of a folder"),
        ("a/b", "cannot be the name of a folder"),
    ],
)
def test_a_name_that_no_folder_can_have_is_refused_by_its_key(name, says):
    assert re.search(says, refusal(check_values, compose("train", ["data.name=x", f"run.name={name}"])))
    assert "data.name=" in refusal(check_values, compose("train", [f"data.name={name}", "run.name=x"]))
    assert compose("train", ["data.name=x", "run.name=lr=0.1"]).run.name == "lr=0.1"


@pytest.fixture
def run(places):
    """A run folder with an odd name, whose config was saved elsewhere."""
    config = compose("train", ["model=tiny", "data.name=x", "run.name=old", "run.dir=old", "checkpoint.resume=old/c"])
    config.optim.lr = 0.5
    folder = places / "runs" / "lr=0.5, b"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cli.to_yaml(config))
    return folder


def test_a_run_folder_continues_the_run_with_its_saved_config(run):
    for words in (["runs/lr=0.5, b", "train.steps=7"], ["train.steps=7", "runs/lr=0.5, b/"]):
        config = compose("train", cli.parse(["train", *words]).overrides)
        assert (config.run.name, config.run.dir) == ("lr=0.5, b", "runs")
        assert (config.optim.lr, config.train.steps, config.checkpoint.resume) == (0.5, 7, "auto")
    os.chdir(run)
    assert compose("train", cli.parse(["train", "."]).overrides).run.name == "lr=0.5, b"


def test_what_is_no_run_folder_is_refused_with_what_would_work(run, places):
    (run / "checkpoints" / "step_5").mkdir(parents=True)
    (places / "runs" / "scan").mkdir()
    (places / "runs" / "scan" / "sweep.json").write_text("{}")
    for word, says in {
        "small": "small is neither a run's folder nor key=value; give for example model=small",
        "runs/nome": "run folder=runs/nome: no such file or folder",
        "runs/lr=0.4, b": "did you mean runs/lr=0.5, b",
        "runs/lr=0.5, b/config.yaml": "to start from a config: --config 'runs/lr=0.5, b/config.yaml'",
        "runs/lr=0.5, b/checkpoints/step_5": f"it is inside a run: megatrain train '{run}'",
        "runs/scan": "is the folder of a sweep",
        "runs": "holds no config.yaml",
    }.items():
        assert says in refusal(cli.parse, ["train", word])


@pytest.fixture
def seen(run, monkeypatch):
    """Start nothing; return the commands of ranks and the words of jobs that would have been started."""
    from megatrain.launch import agent, slurm

    (run / "events.jsonl").touch()
    monkeypatch.setattr("megatrain.verbs.path_checks.check_paths", lambda *_: None)
    monkeypatch.setattr("megatrain.verbs.resources.warnings", lambda config, on_gpu: [])
    seen = []
    monkeypatch.setattr(agent, "launch", lambda command, *rest: seen.append(command) or 0)
    monkeypatch.setattr(slurm, "submit", lambda config, name, words, dry_run: seen.append(words) or 0)
    return seen


def test_another_run_with_a_runs_config_says_that_it_is_new(run, seen, capsys):
    for words in (["run.name=other"], ["run.name=other", "launch=slurm"], ["run.dir=elsewhere"]):
        assert cli.main(["train", "runs/lr=0.5, b", *words]) == 0
        said = capsys.readouterr().err
        assert "is a new run, from step 0, with the config of runs/lr=0.5, b; " in said, words
        assert "to continue runs/lr=0.5, b instead: megatrain train 'runs/lr=0.5, b'; " in said
        (weights,) = shlex.split(said.partition(": add ")[2].splitlines()[0])
        assert compose("train", [weights]).checkpoint.init_from == "runs/lr=0.5, b"
    (run.parent / "other" / "checkpoints" / "step_00000001").mkdir(parents=True)
    for words in (
        ["run.name=other"],
        ["run.name=new", "checkpoint.init_from=runs/other"],
        ["checkpoint.resume=runs/x"],
    ):
        assert cli.main(["train", "runs/lr=0.5, b", *words]) == 0
        assert "is a new run" not in capsys.readouterr().err, words


def test_ranks_and_jobs_get_the_words_of_a_run_folder(run, seen, capsys):
    assert cli.main(["train", str(run)]) == cli.main(["train", str(run), "launch=slurm"]) == 0
    started, submitted = seen
    assert "is a new run" not in capsys.readouterr().err
    words = [f"--config={run}/config.yaml", f"run.dir={run.parent}", "run.name='lr=0.5, b'", "checkpoint.resume=auto"]
    assert started[-4:] == words and submitted == [*words, "launch=slurm"]
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["name"] == "old", "nothing has written to it"
    assert types.SimpleNamespace(**vars(compose("train", words))).optim.lr == 0.5


def test_what_follows_the_base_of_a_tuning_are_files_or_a_dataset(tmp_path):
    (tmp_path / "data" / "talks").mkdir(parents=True)
    (tmp_path / "data" / "talks" / "card.json").write_text("{}")
    found = expand_path("tune", ["runs/base", "it's, a.jsonl", "b.jsonl", "optim.lr=1"])
    assert found[0] == "path=runs/base" and found[2:] == ["optim.lr=1"]
    assert read_overrides("tune", found).values["data.paths"] == ["it's, a.jsonl", "b.jsonl"]
    assert expand_path("tune", ["runs/base", "data/talks"]) == ["path=runs/base", "data=data/talks"]

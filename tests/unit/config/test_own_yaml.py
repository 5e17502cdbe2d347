"""A user's own YAML: choices in folders and files, and whole configs."""

import re

import pytest

from megatrain import cli
from megatrain.config.compose import compose
from megatrain.errors import ConfigError
from megatrain.verbs.sweep_points import compose_points


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write files into a folder of own choices, and return it."""
    monkeypatch.chdir(tmp_path)

    def write(**files):
        folder = tmp_path / "my configs"
        for name, text in files.items():
            file = folder / f"{name.replace('__', '/')}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return folder

    return write


def refusal(*words, verb="train"):
    with pytest.raises(ConfigError) as caught:
        compose(verb, list(words))
    return str(caught.value)


MODEL = "num_layers: 3\nnum_heads: 2\nhidden_size: 48\n"


def test_help_lists_the_choices_of_a_folder(own, capsys):
    folder = own(model__mine=MODEL, experiment__night="# @package _global_\nseed: 3\n")
    for words in (["--help", "model"], ["--help"]):
        assert cli.main(["train", *words, f"--config-dir={folder}"]) == 0
        assert "mine" in capsys.readouterr().out
    assert cli.main(["train", "--help", "experiment", f"hydra.searchpath=['{folder}']"]) == 0
    assert "night, quickstart" in capsys.readouterr().out
    assert cli.main(["train", "--help", "model"]) == 0
    assert "mine" not in capsys.readouterr().out


def test_every_group_takes_choices_from_a_folder_however_it_is_named(own):
    folder = own(
        model__my=MODEL,
        model__wide="defaults:\n  - tiny\n  - _self_\nhidden_size: 256\n",
        data__my="kind: files\npaths: [a.txt]\n",
        launch__cluster="defaults: [slurm, _self_]\nnum_nodes: 2\nnproc_per_node: 4\npartition: gpu\n",
        experiment__my="# @package _global_\ndefaults:\n  - override /model: my\noptim: {lr: 1e-2}\n",
    )
    for word in (f"--config-dir={folder}", f"hydra.searchpath=['{folder}']", f"hydra.searchpath=[file://{folder}]"):
        config = compose("train", [word, "model=my", "data=my", "launch=cluster"])
        assert (config.model.name, config.model.num_layers, config.model.norm) == ("my", 3, "rmsnorm")
        assert (config.data.name, config.data.paths, config.run.name) == ("my", ["a.txt"], "my-my")
        assert (config.launch.name, config.launch.num_nodes, config.launch.partition) == ("slurm", 2, "gpu")
    config = compose("train", [word, "model=wide"])
    assert (config.model.name, config.model.num_layers, config.model.hidden_size) == ("wide", 4, 256)
    config = compose("train", [word, "experiment=my"])
    assert (config.model.num_layers, config.optim.lr) == (3, 0.01)
    assert compose("prepare", [word, "data=my"]).data.name == "my"


def test_the_users_choice_wins_over_ours_and_an_earlier_folder_over_a_later_one(own, tmp_path):
    folder = own(model__tiny=MODEL)
    (tmp_path / "other" / "model").mkdir(parents=True)
    (tmp_path / "other" / "model" / "tiny.yaml").write_text("num_layers: 9")
    (tmp_path / "other" / "model" / "nine.yaml").write_text("num_layers: 9")
    both = [f"--config-dir={folder}", "--config-dir=other"]
    assert compose("train", [*both, "model=tiny"]).model.num_layers == 3
    assert compose("train", [*reversed(both), "model=tiny"]).model.num_layers == 9
    assert compose("train", [*both, "model=nine"]).model.name == "nine"
    assert compose("train", ["model=tiny"]).model.num_layers == 4, "nothing of it stays"


def test_a_choice_may_be_a_file_anywhere(own):
    folder = own(model__my=MODEL, experiment__my="optim: {lr: 0.5}\n")
    assert compose("train", [f"model={folder}/model/my.yaml"]).model.num_layers == 3
    assert compose("train", [f"experiment={folder}/experiment/my.yaml"]).optim.lr == 0.5
    assert compose("train", [f"--config-dir={folder}", "model=my.yaml"]).model.name == "my"


@pytest.mark.parametrize(
    ("files", "words", "says"),
    [
        (
            {"model__my": MODEL},
            ["model=myy"],
            r"did you mean model=my\? .*searched .*my configs/model and megatrain's own",
        ),
        (
            {"model__my": "num_layer: 3"},
            ["model=my"],
            r"my.yaml: unknown key model.num_layer; did you mean model.num_layers",
        ),
        ({"model__my": "num_layers: many"}, ["model=my"], r"my.yaml: model.num_layers: many: expected a whole number"),
        ({"model__my": "num_layers: 0"}, ["model=my"], r"model.num_layers=0 is out of range"),
        ({"model__my": "a: [1"}, ["model=my"], r"my.yaml is not YAML: [^<]* at line 1"),
        ({"model__my": ""}, ["model=my"], r"my.yaml is empty, .*; restore it, or give another file"),
        ({"experiment__my": "# only a comment\n{}"}, ["experiment=my"], r"my.yaml is empty"),
        ({"model__my": "just text"}, ["model=my"], r"my.yaml does not hold keys with values"),
        ({"model__my": "defaults: [tinny]"}, ["model=my"], r"my.yaml.*tinny"),
        ({"experiment__my": "model: tiny"}, ["experiment=my"], r"defaults: \[override /model: tiny\]"),
        (
            {"experiment__my": "max_steps: 3"},
            ["experiment=my"],
            r"my.yaml: unknown key max_steps; did you mean train.steps",
        ),
        (
            {"data__my": "kind: files\npaths: [a, null]"},
            ["data=my"],
            r"my.yaml: data.paths: .*: expected a list of texts such as \[a,b\], given a list with null$",
        ),
        ({"data__my": "kind: files\npaths: [{a: 1}]"}, ["data=my"], r"data.paths: .* given a list with a mapping"),
        ({"stray": ""}, ["model=tiny"], r"--config-dir=.* has none of the folders model, data"),
    ],
)
def test_a_mistake_in_a_users_file_names_the_file_and_the_key(own, files, words, says):
    assert re.search(says, refusal(f"--config-dir={own(**files)}", *words))


def test_folders_and_files_that_do_not_exist_are_refused_by_name(own):
    own()
    assert "--config-dir=none: none is not a folder" in refusal("--config-dir=none")
    assert "hydra.searchpath=[none]: none is not a folder" in refusal("hydra.searchpath=[none]")
    assert "pkg://no.such cannot be imported" in refusal("hydra.searchpath=[pkg://no.such]")
    assert "none.yaml cannot be read: No such file" in refusal("--config=none.yaml")
    assert "has no config groups" in refusal("path=x", "--config-dir=.", verb="inspect")


def test_a_printed_config_composes_to_itself_and_the_command_line_wins_over_it(own, tmp_path, capsys):
    words = ["model=tiny", "run.name=1e3", "data.name=007", "optim.lr=1e-5", "run.sweep=scan", "data.paths=[a (1).txt]"]
    assert cli.main(["train", "--cfg", *words]) == 0
    saved = tmp_path / "saved.yaml"
    saved.write_text(capsys.readouterr().out)
    assert compose("train", [f"--config={saved}"]) == compose("train", words)
    config = compose("train", [f"--config={saved}", "model=small", "train.steps=3", "run.name=other"])
    assert config.model == compose("train", ["model=small"]).model
    assert (config.train.steps, config.optim.lr, config.data.name) == (3, 1e-5, "007")
    assert config.run.sweep is None, "another run is no point of the sweep"
    assert compose("train", [f"--config={saved}", "run.name=1e3"]).run.sweep == "scan"
    assert compose("prepare", [f"--config={saved}"]).data.paths == ["a (1).txt"]
    assert compose("layouts", [f"--config={saved}"]).model.name == "tiny"
    assert "give one of them" in refusal(f"--config={saved}", "experiment=quickstart")
    saved.write_text("")
    assert f"{saved} is empty" in refusal(f"--config={saved}")
    saved.write_text("train: {stepz: 3}")
    assert f"{saved}: unknown key train.stepz; did you mean train.steps?" in refusal(f"--config={saved}")


def test_the_ranks_and_the_points_of_a_sweep_get_the_same_flags(own, monkeypatch):
    folder = own(model__my=MODEL, model__mine=MODEL)
    arguments = cli.parse(["train", "--config-dir", str(folder), "model=my"])
    assert arguments.overrides == [f"--config-dir={folder}", "model=my"]
    points = compose_points([*arguments.overrides[:1], "data.name=x", "model=glob(m*)"])
    assert [point.config.run.name for point in points] == ["x-mine", "x-my"]
    assert all(point.overrides[0] == f"--config-dir={folder}" for point in points)


def test_a_time_in_a_file_is_not_a_number_to_the_base_60(own):
    folder = own(launch__my="defaults: [slurm, _self_]\ntime: 12:00:00\n")
    assert compose("train", [f"--config-dir={folder}", "launch=my"]).launch.time == "12:00:00"


@pytest.mark.parametrize(
    ("files", "word", "says"),
    [
        (
            {"model__my": "defaults: [tiney]\nnum_layers: 2\n"},
            "model=my",
            r"model/my.yaml: .* no model named tiney; .*tiny\? \(c",
        ),
        (
            {"experiment__e": "defaults:\n  - override /model: smal\n"},
            "experiment=e",
            r"experiment/e.yaml: .*mean small\?",
        ),
        (
            {"model__my": "defaults: [base]\n", "model__base": "defaults: [nowhere]\nnum_layers: 2\n"},
            "model=my",
            r"model/base.yaml: .*no model named nowhere .*choices of model: base, gpt2_124m",
        ),
    ],
)
def test_a_wrong_name_in_defaults_is_refused_with_file_and_choices(own, files, word, says):
    message = refusal(f"--config-dir={own(**files)}", word)
    assert re.search(says, message) and "provider" not in message


def test_a_choice_that_includes_itself_is_refused(own):
    folder = own(model__loop="defaults: [loop]\n")
    assert re.search(r"my configs.* includes itself in its defaults", refusal(f"--config-dir={folder}", "model=loop"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "num_layers: 3\nnum_heads: 2\nnum_layers: 4\n",
            "line 3: num_layers is given twice, first in line 1; keep one",
        ),
        ("num_layers: 3\nrope: &a\n  x: 1\n  y: 2\n  x: 3\n", "line 5: x is given twice, first in line 3; keep one"),
        ("defaults: [tiny]\n'num_layers': 3\nnum_layers: 3\n", "line 3: num_layers is given twice, first in line 2"),
        ("{num_layers: 3, num_heads: 2, num_layers: 4}\n", "line 1: num_layers is given twice; keep one"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_lines(own, tmp_path, text, says):
    """In a folder of choices, in a file named as a choice, and in a whole config."""
    folder = own(model__my=text)
    file = folder / "model" / "my.yaml"
    for words in ([f"--config-dir={folder}", "model=my"], [f"model={file}"], [f"--config={file}"]):
        assert f"{file}, {says}" in refusal(*words), words


def test_a_folder_or_a_dead_link_named_like_a_choice_is_none(own):
    folder = own(model__mine=MODEL)
    (folder / "model" / "folder.yaml").mkdir()
    (folder / "model" / "dead.yaml").symlink_to("nowhere")
    for name in ("folder", "dead"):
        said = refusal(f"--config-dir={folder}", f"model={name}")
        assert f"unknown choice model={name}" in said and "mine" in said
        assert f"{name}," not in said


def test_merged_keys_are_not_given_twice(tmp_path):
    """YAML's << merges a mapping that has merged another one before."""
    from megatrain.config.choices import read_yaml

    file = tmp_path / "x.yaml"
    file.write_text("a: &a {web: 1, code: 2}\nb: &b {<<: *a, code: 5}\nc: {<<: *b, zh: 1}\n")
    assert read_yaml(file)[0]["c"] == {"web": 1, "code": 5, "zh": 1}

"""What prepare, import and export say to type next. The commands are read as a shell and the command line would."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatrain import cli
from megatrain.checkpoint import weights
from megatrain.config import ModelConfig
from megatrain.config.compose import compose
from megatrain.data import preparation
from megatrain.verbs import export, import_, multirun, prepare


def commands(capsys):
    """Return the commands of the line that says what to type next; standard output must not have it."""
    shown = capsys.readouterr()
    assert "next:" not in shown.out
    _, first, rest = shown.err.partition("next: ")
    assert first and "next: " not in rest
    return rest.removesuffix("\n").split("\n  or: ")


def read(command):
    """Return the config that a command gives, and its verb."""
    arguments = cli.parse(shlex.split(command)[1:])
    return arguments.verb, compose(arguments.verb, arguments.overrides)


@pytest.mark.parametrize("name", ["python_stdlib", "mine", "it's, (odd)"])
@pytest.mark.parametrize("folder", ["data", "my data/[1]"])
def test_prepare_says_how_to_train_on_its_dataset_and_look_at_it(name, folder, monkeypatch, capsys):
    config = compose("prepare", [])
    config.data.name, config.data.dir = name, folder
    monkeypatch.setattr(preparation, "prepare", lambda config: Path(config.data.dir) / config.data.name)
    assert prepare.prepare(config) == Path(folder) / name
    command, report = commands(capsys)
    verb, found = read(command)
    assert (verb, found.data.name, found.data.dir) == ("train", name, folder)
    verb, page = read(report)
    assert (verb, page.path) == ("report", f"{folder}/{name}")
    assert ("data.dir" in command) == (folder != "data"), "only what differs from the defaults"
    assert command.split()[:3] == ["megatrain", "train", "model=small"], "the size of the model is the user's to choose"
    assert found.train.steps == 1000, "the default is for a trial"


def test_the_datasets_of_the_readme_lead_to_its_runs(monkeypatch, capsys):
    monkeypatch.setattr(preparation, "prepare", lambda config: Path(config.data.dir) / config.data.name)
    for folder, rest in {"data": "", "d": " data.dir=d"}.items():
        words = ["data=python_stdlib", "data.name=quickstart", "tokenizer.vocab_size=2048", f"data.dir={folder}"]
        prepare.prepare(compose("prepare", words), words)
        command = commands(capsys)[0]
        assert command == f"megatrain train experiment=quickstart{rest}"
        assert (read(command)[1].data.name, read(command)[1].data.dir) == ("quickstart", folder)
    prepare.prepare(compose("prepare", ["data=toy"]), ["data=toy"])
    assert commands(capsys)[0] == "megatrain train experiment=assistant_toy"
    for kind, method in {"chat": "sft", "pairs": "dpo", "prompts": "grpo"}.items():
        words = [f"data={kind}", "data.paths=[x]", "data.name=talks", "data.dir=d"]
        prepare.prepare(compose("prepare", words), words)
        verb, found = read(commands(capsys)[0].replace("<run>", "x"))
        assert (verb, found.method.name, found.data.name, found.data.dir) == ("tune", method, "talks", "d")
    words = ["data=files", "data.paths=[x]", "data.name=quickstart"]
    prepare.prepare(compose("prepare", words), words)
    assert "experiment=" not in commands(capsys)[0], "another text"


def test_a_prepared_dataset_of_files_is_named_as_a_choice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("Some text, and more of it.\n" * 20)
    base = ["data=files", "data.paths=[a.txt]", "tokenizer.vocab_size=300"]
    for words, expected in {
        ("data.name=mine",): "data=mine",
        ("data.name=mine", "data.dir=d2"): "data=mine data.dir=d2",
        ("data.name=tinystories",): "data=files data.name=tinystories",  # another choice has the name
    }.items():
        prepare.prepare(compose("prepare", [*base, *words]), [*base, *words])
        command = commands(capsys)[0]
        assert command == f"megatrain train model=small {expected} train.steps=1000"
        found = read(command)[1].data
        assert [f"data.name={found.name}", f"data.dir={found.dir}"] == [*words, "data.dir=data"][:2]


def test_the_model_of_a_config_file_stays(monkeypatch, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("model: {num_layers: 3}\n")
    monkeypatch.setattr(preparation, "prepare", lambda config: Path(config.data.dir) / config.data.name)
    words = [f"--config={tmp_path}/c.yaml"]
    prepare.prepare(compose("prepare", words), words)
    assert read(commands(capsys)[0])[1].model.num_layers == 3


def test_prepare_says_how_to_train_on_the_mixture_that_it_prepared(monkeypatch, capsys):
    monkeypatch.setattr(prepare, "prepare_demo", lambda config: Path("data/demo"))
    words = ["data=demo", "data.mixture={english: 0.9, poetry: 0.1}", "tokenizer.vocab_size=16384"]
    prepare.prepare(compose("prepare", words), words)
    command, report = commands(capsys)
    verb, found = read(command)
    assert (verb, found.data.kind) == ("train", "demo") and found.data.mixture == {"english": 0.9, "poetry": 0.1}
    assert read(report)[1].path == "data/demo"


def loaded(monkeypatch, module, kind):
    found = SimpleNamespace(
        config=ModelConfig(vocab_size=300), weights={}, tokenizer=object(), tokenizer_dir=None,
        need_tokenizer=lambda **_: SimpleNamespace(end_of_document=0), describe=lambda: "a model",
        need_dense=dict, lora=None, manifest=None,
    )  # fmt: skip
    monkeypatch.setattr(module, "load", lambda *_: found)
    monkeypatch.setattr(module, "kind_of", lambda _: kind)
    return found


@pytest.mark.parametrize("out", ["imported", "my models/it's"])
def test_import_says_how_to_use_its_checkpoint(out, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = loaded(monkeypatch, import_, "huggingface")
    monkeypatch.setattr(import_, "write_weights", lambda *_: None)
    config = compose("import", ["path=x", "out=x"])
    config.out = out
    import_.import_(config)
    generate, train = map(read, commands(capsys))
    assert (generate[0], generate[1].path) == ("generate", out)
    assert (train[0], train[1].checkpoint.init_from) == ("train", out)
    found.tokenizer = None
    import_.import_(config)
    assert [read(command)[0] for command in commands(capsys)] == ["train"], "no text without a tokenizer"


def test_export_says_how_to_use_its_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    loaded(monkeypatch, export, "checkpoint")
    monkeypatch.setattr(export, "generation", lambda *_: {})
    monkeypatch.setattr(export, "export_model", lambda *_, **__: None)
    config = compose("export", ["path=x", "out=x"])
    config.out = "my models/it's"
    export.export_(config)
    generate, theirs = commands(capsys)
    assert read(generate)[1].path == "my models/it's"
    assert theirs == 'transformers.AutoModelForCausalLM.from_pretrained("my models/it\'s")'


FOLDER = "--config-dir=my configs"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a dataset and a model of the user's own."""
    monkeypatch.chdir(tmp_path)
    for file, text in {"data/mine": "kind: files\npaths: [a.txt]\n", "model/my": "num_layers: 1\n"}.items():
        (tmp_path / "my configs" / file).parent.mkdir(parents=True)
        (tmp_path / "my configs" / f"{file}.yaml").write_text(text)
    (tmp_path / "a.txt").write_text("text")


@pytest.mark.parametrize(
    "words",
    [[FOLDER, "data=mine"], [FOLDER, "+data=mine", "data.name=b", "data.dir=d d"], ["data=my configs/data/mine.yaml"]],
)
def test_prepare_says_how_to_train_with_the_same_folders_and_choice(words, own, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "prepare", lambda config: Path(config.data.dir) / config.data.name)
    assert cli.main(["prepare", "data=files", *words]) == 0
    command, _ = commands(capsys)
    verb, found = read(command)
    assert (verb, found.data) == ("train", compose("prepare", words).data)


@pytest.mark.parametrize(
    "words",
    [
        [FOLDER, "data=mine", "model=my"],
        [FOLDER, "data=tinystories", "data=mine", "data.name=b", "data.dir=d d", "tokenizer.vocab_size=300", "seed=3"],
        ["data=files", "data.paths=[a.txt]", "data.name=c"],
        ["data.name=python_stdlib", "optim.lr=1"],
    ],
)
def test_a_missing_dataset_names_a_command_that_prepares_the_one_asked_for(words, own, capsys):
    assert cli.main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert "?;" not in said
    verb, found = read(said.partition("prepare it first: ")[2].partition(" (prepared so far")[0])
    wanted = compose("train", words)
    assert (verb, found.data, found.tokenizer) == ("prepare", wanted.data, wanted.tokenizer)


@pytest.mark.parametrize("folder", ["runs/x", "it's, (odd)/[1] x"])
def test_a_path_in_advice_is_quoted_for_the_shell(folder, monkeypatch):
    monkeypatch.setattr(weights, "saved_meta", lambda _: {"kind": "hf"})
    _, found = read(f"megatrain prepare {weights.tokenizer_arguments(Path(folder))}")
    assert (found.tokenizer.kind, found.tokenizer.path) == ("hf", folder)
    monkeypatch.setattr(multirun, "sweep_folder", lambda _: Path(folder))
    start, _, command = multirun.what_next([]).partition(" ")
    assert start == "next:" and read(command)[1].path == folder


def test_a_missing_dataset_of_files_says_where_its_paths_go(own, capsys):
    assert cli.main(["train", "data=files", "data.name=c"]) == 2
    said = capsys.readouterr().err
    assert "megatrain prepare data=files 'data.paths=[<paths>]' data.name=c" in said and "data.dir" not in said


def test_a_reward_model_is_said_to_judge_and_not_to_write(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = loaded(monkeypatch, export, "checkpoint")
    found.config.output = "score"
    monkeypatch.setattr(export, "export_model", lambda *_, **__: None)
    monkeypatch.setattr(export, "generation", lambda *_: {})
    export.export_(compose("export", ["path=x", "out=my judge"]))
    judges, theirs = commands(capsys)
    verb, config = read(judges)
    assert (verb, config.judge) == ("evaluate", "my judge")
    assert theirs == "transformers.AutoModelForSequenceClassification.from_pretrained('my judge')"
    loaded(monkeypatch, import_, "huggingface").config.output = "score"
    monkeypatch.setattr(import_, "write_weights", lambda *_: None)
    import_.import_(compose("import", ["path=x", "out=judge"]))
    assert [read(command)[1].judge for command in commands(capsys)] == ["judge"]

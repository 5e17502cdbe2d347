"""Completion of the command line, as a shell asks for it."""

import shutil
import subprocess
import sys

import pytest

from megatrain import cli
from megatrain.config import ReportConfig
from megatrain.verbs.completion import SCRIPTS, candidates
from megatrain.verbs.report import report


def complete(line):
    return candidates(f"megatrain {line}", cli.FLAGS)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    (tmp_path / "runs" / "lr=0.1").mkdir(parents=True)
    for made in ("mlartifacts", "logs"):
        (tmp_path / "runs" / made).mkdir()
    (tmp_path / "runs" / "mlflow.db").touch()
    (tmp_path / "odd name").mkdir()
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "tidy.yaml").write_text("num_layers: 1")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("tr", ["train"]),
        ("train mod", ["model=", "model."]),
        ("train model=ti", ["model=tiny"]),
        ("train --config-dir own model=ti", ["model=tidy", "model=tiny"]),
        ("train --config-dir=own model=small,ti", ["model=small,tidy", "model=small,tiny"]),
        ("train optim.b", ["optim.betas="]),
        ("train seed=3 optim.schedule=c", ["optim.schedule=cosine", "optim.schedule=constant"]),
        ("train compile=", ["compile=true", "compile=false"]),
        ("train run.dir=ru", ["run.dir=runs/"]),
        ("train run", ["run.", "runs/"]),
        ("inspect runs/", ["runs/lr=0.1/"]),
        ("train checkpoint.init_from=runs/", ["checkpoint.init_from=runs/lr=0.1/"]),
        ("train runs/", ["runs/lr=0.1/"]),
        ("evaluate x data=runs/ml", ["data=runs/mlartifacts/", "data=runs/mlflow.db"]),
        ("train --conf", ["--config", "--config-dir"]),
        ("train --config-dir o", ["own/"]),
        ("--completion z", ["zsh"]),
        ("train xyz=", []),
        ("train data.name='a ", []),
    ],
)
def test_the_last_word_is_completed(line, expected):
    assert complete(line) == expected


def test_every_verb_offers_its_keys_and_groups():
    assert complete("")[:2] == ["prepare", "train"]
    assert {"model=", "train.", "seed=", "experiment="} <= set(complete("train "))
    assert "path=" in complete("evaluate ")


def test_completion_is_quick_because_it_imports_neither_torch_nor_hydra():
    program = (
        "import sys; from megatrain.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'hydra', 'omegaconf'} & set(sys.modules); sys.exit(f'imported {heavy}' if heavy else code)"
    )
    command = [sys.executable, "-c", program, "--complete", "megatrain train model=ti"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "model=tiny\n"), done.stderr


DRIVERS = {
    "bash": """{script}
COMP_WORDS=({command} {line}); COMP_LINE="megatrain {line}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDBREAKS=$' =:'
compopt() {{ :; }}
_megatrain; printf '%s\\n' "${{COMPREPLY[@]}}"
""",
    "zsh": """compdef() {{ :; }}
compadd() {{ print -l -- ${{(P)@[-1]}}; }}
{script}
words=({command} {line}); CURRENT=$#words
_megatrain
""",
    "fish": """function megatrain; {command} $argv; end
{script}
complete -C 'megatrain {line}'
""",
}


@pytest.mark.parametrize(("shell", "shown"), [("bash", "tiny"), ("zsh", "model=tiny"), ("fish", "model=tiny")])
def test_a_shell_shows_the_candidates(shell, shown, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "megatrain"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatrain "$@"\n')
    command.chmod(0o755)
    driver = DRIVERS[shell].format(script=SCRIPTS[shell], command=command, line="train model=ti")
    done = subprocess.run([shell, "-c", driver], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [shown], done.stderr


def test_the_script_of_an_unknown_shell_is_refused(capsys):
    assert cli.main(["--completion", "csh"]) == 2
    assert "there is completion for bash, zsh, fish" in capsys.readouterr().err
    assert cli.main(["--completion"]) == 2
    assert "--completion needs a value" in capsys.readouterr().err
    assert cli.main(["--completion=fish"]) == 0
    assert "complete -c megatrain" in capsys.readouterr().out


def test_names_of_prepared_datasets_and_runs_with_steps_are_offered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("data/small", "elsewhere/mine", "data/unfinished", "runs/begun/owner", "runs/refused/owner"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data/small/card.json").touch()
    (tmp_path / "elsewhere/mine/card.json").touch()
    (tmp_path / "runs/begun/metrics.jsonl").write_text("{}\n")
    (tmp_path / "runs/refused/config.yaml").write_text("seed: 1\n")
    assert complete("train data.name=") == ["data.name=small"]
    assert complete("train data.dir=elsewhere data.name=m") == ["data.name=mine"]
    assert "runs/begun/" in (found := complete("evaluate runs/")) and "runs/refused/" not in found
    report(ReportConfig(path="runs/refused"))
    assert "runs/refused has no steps yet" in capsys.readouterr().err

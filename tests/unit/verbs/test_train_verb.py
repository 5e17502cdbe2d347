"""What `megatrain train` does before its ranks run."""

import shutil
from pathlib import Path

import pytest

from megatrain import cli
from megatrain.config.compose import compose
from megatrain.errors import EnvironmentFault
from megatrain.launch import agent
from megatrain.launch.nodes import SingleNode
from megatrain.verbs import resources
from megatrain.verbs.train import prepare_missing, start_workers


def test_a_start_says_at_once_how_many_ranks_and_where_their_log_is(tmp_path, monkeypatch, capsys):
    """The first imports of the ranks take seconds, so the line comes before them."""
    seen = []
    monkeypatch.setattr(resources, "warnings", lambda *_: ())
    monkeypatch.setattr(agent, "launch", lambda *_: seen.append(capsys.readouterr().err) or 0)
    config = compose("train", [f"run.dir={tmp_path}", "run.name=first", "launch.nproc_per_node=2"])
    assert start_workers(config, [], SingleNode()) == 0
    assert seen == [f"megatrain: starting 2 ranks (log: {tmp_path}/first/logs/rank_00000.log)\n"]


@pytest.fixture
def continued(finished, tmp_path, monkeypatch):
    """Return a copy of a finished run of four steps, and a function that tells whether a command on it starts ranks."""
    run = Path(shutil.copytree(finished, tmp_path / "runs" / "first"))
    launched = []
    monkeypatch.setattr(agent, "launch", lambda *_: launched.append(1) or 0)

    def starts_ranks(*words):
        launched.clear()
        assert cli.main(["train", str(run), *words]) == 0
        return bool(launched)

    return run, starts_ranks


def test_a_finished_run_has_nothing_to_do_and_starts_no_rank(continued, capsys):
    """What changes a key is for the ranks to judge."""
    run, starts_ranks = continued
    before = sorted(run.rglob("*"))
    assert not starts_ranks("train.steps=4")
    assert "is at step 4 of train.steps=4: nothing to do" in capsys.readouterr().out
    assert sorted(run.rglob("*")) == before
    assert starts_ranks("train.steps=6") and starts_ranks("train.steps=3") and starts_ranks("kernels=reference")
    assert starts_ranks(f"checkpoint.resume={run}")


def test_a_finished_run_whose_newest_checkpoint_is_damaged_starts_its_ranks(continued):
    """They continue from the one before it."""
    run, starts_ranks = continued
    shard = max(next(iter(sorted((run / "checkpoints").iterdir(), reverse=True))).glob("*.safetensors"))
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    assert starts_ranks()


@pytest.fixture
def prepared(monkeypatch):
    """Let preparing fail as it does without a network; return the configs that it was given."""
    configs = []

    def fail(config):
        configs.append(config)
        raise EnvironmentFault("no network")

    monkeypatch.setattr("megatrain.data.demo.corpus.prepare_demo", fail)
    return configs


@pytest.mark.parametrize("more", [[], ["--multirun", "seed=1,2"], ["launch=slurm"]])
def test_a_start_prepares_the_missing_sources_of_the_demonstration_corpus_first(prepared, more, tmp_path, capsys):
    """Before anything else is checked on the disk, and with the keys of the command."""
    words = ["experiment=demo", f"data.dir={tmp_path}/data", f"run.dir={tmp_path}", "tokenizer.vocab_size=900"]
    assert cli.main(["train", *words, *more]) == 8
    error = capsys.readouterr().err
    assert "preparing english, chinese, web, code, dialogues of the demonstration corpus first" in error
    assert prepared[0].data == compose("train", words).data and prepared[0].tokenizer.vocab_size == 900


def test_sources_that_are_there_are_not_prepared_again(prepared, tmp_path):
    words = ["experiment=demo", f"data.dir={tmp_path}", "data.mixture={code: 1, web: 2}"]
    config = compose("train", words)
    for name in ("code", "web"):
        (tmp_path / "demo" / name).mkdir(parents=True)
        (tmp_path / "demo" / name / "card.json").write_text("{}")
    prepare_missing(config)
    prepare_missing(compose("train", ["data=mixture", "data.mixture={gone: 1}"]))
    assert prepared == []


def test_a_dry_run_prepares_nothing_and_names_the_command(prepared, tmp_path, capsys):
    words = ["train", "experiment=demo", f"data.dir={tmp_path}/d", f"run.dir={tmp_path}", "seed=1,2"]
    assert cli.main([*words, "--multirun", "--dry-run"]) == 2
    assert f"make it with: megatrain prepare data=demo data.name=demo data.dir={tmp_path}/d" in capsys.readouterr().err
    assert prepared == []

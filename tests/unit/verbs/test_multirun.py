"""`megatrain train --multirun` up to the start of the points: values, names and refusals."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import yaml

from megatrain import cli
from megatrain.config.compose import compose
from megatrain.config.values import quoted
from megatrain.errors import ConfigError
from megatrain.tracking.sweep_record import SweepPoint, SweepRecord
from megatrain.verbs.sweep_points import (
    MAX_POINTS,
    MAX_SUFFIX,
    compose_points,
    expand,
    point_suffix,
    write_record,
)

TINY = ["model=tiny", "data=files", "data.name=books"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def names(points):
    return [point.config.run.name for point in points]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("model=tiny,small", ["tiny", "small"]),
        ("optim.lr=1e-3,3e-4", ["0.001", "0.0003"]),
        ("seed=range(1,4)", ["1", "2", "3"]),
        ("train.steps=range(10,31,step=10)", ["10", "20", "30"]),
        ("optim.lr=choice(0.1,0.2)", ["0.1", "0.2"]),
        ("model=glob(gpt2*,exclude=*m)", []),
        ("model=glob([llama_1b,llama_8*])", ["llama_1b", "llama_8b"]),
        ("optim.betas=[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]),
        ("compile=true,false", ["True", "False"]),
        ("model.num_kv_heads=null,2", ["null", "2"]),
        ("tokenizer.path='a,b',c", ["'a,b'", "c"]),
        ("+seed=1,2", ["1", "2"]),
    ],
)
def test_values_are_written_as_in_hydra(word, values):
    if not values:
        with pytest.raises(ConfigError, match="this gives no values"):
            expand([word])
        return
    key = word.lstrip("+").partition("=")[0]
    assert expand([word]) == ({}, [{key: value} for value in values])


def test_every_combination_is_a_point_and_what_is_not_swept_stays_as_typed():
    fixed, points = expand(["data.paths=[text/**/*.txt]", "model=tiny,small", "seed=1", "optim.lr=1,2", "seed=3"])
    assert fixed == {"data.paths": "data.paths=[text/**/*.txt]", "seed": "seed=3"}
    assert [tuple(point.values()) for point in points] == [("tiny", "1"), ("tiny", "2"), ("small", "1"), ("small", "2")]
    assert expand(["optim.lr=5", "optim.lr=1,2", "seed=1,2", "seed=7"]) == (
        {"seed": "seed=7"},
        [{"optim.lr": "1"}, {"optim.lr": "2"}],
    )


def test_a_point_is_the_run_that_its_overrides_start():
    """So are its name and its sweep."""
    points = compose_points([*TINY, "optim.lr=1e-3,3e-4", "train.seq_len=32,64", "run.name=scan"])
    assert names(points) == [
        "scan-lr0.001-seq_len32", "scan-lr0.001-seq_len64", "scan-lr0.0003-seq_len32", "scan-lr0.0003-seq_len64",
    ]  # fmt: skip
    for point in points:
        assert compose("train", point.overrides) == point.config
        assert point.config.run.sweep == "scan" and point.folder.parts == ("runs", point.config.run.name)
    assert points[2].config.optim.lr == 3e-4 and points[2].config.train.seq_len == 32


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.lr=1,2", "model=tiny,small"], "books-tiny-lr1"),  # the schema's order, not the typist's
        (["model=tiny,small", "optim.lr=1,2"], "books-tiny-lr1"),
        (["model=tiny", "optim.lr=1e-5,2"], "tiny-books-lr1e-05"),
        (["model=tiny", "optim.schedule=wsd,cosine"], "tiny-books-schedule_wsd"),
        (
            ["model=tiny", "precision=bf16", "precision.accumulate_dtype=fp32,bf16"],
            "tiny-books-accumulate_dtype_fp32",
        ),
        (["model=tiny", "precision=bf16,fp32", "run.name='my, scan'"], "my, scan-bf16"),
        (["model=tiny", "optim.betas=[0.9,0.95],[0.9,0.99]"], "tiny-books-betas0.9_0.95"),
        (["model=tiny", "train.steps=5,6", "train.eval_steps=1,2"], "tiny-books-steps5-eval_steps1"),
        (["experiment=quickstart", "seed=1,2"], "quickstart-seed1"),
        (["model=tiny", "data.name=books", "data.dir=a/b,c"], "tiny-books-dir_a_b"),
    ],
)
def test_a_runs_name_is_readable_stable_and_valid_as_a_folder(words, expected):
    assert names(compose_points(["data=files", "data.name=books", "data.paths=[x]", *words]))[0] == expected


@pytest.mark.parametrize(
    ("words", "sweep", "first"),
    [
        (["model=tiny,small", "data=files", "data.name=books,news"], "model-name", "model-name-tiny-name_books"),
        (["model=tiny", "data=python_stdlib,code"], "tiny-data", "tiny-data-python_stdlib"),
    ],
)
def test_no_point_has_the_name_of_a_plain_run(words, sweep, first):
    """Otherwise the second sweep would go on with tiny-python_stdlib, the run of `megatrain train model=tiny`."""
    points = compose_points([*words, "data.paths=[x]"])
    assert (points[0].config.run.sweep, names(points)[0]) == (sweep, first)


def test_the_points_of_a_recorded_sweep_keep_their_names(tmp_path, monkeypatch):
    """A sweep of an earlier version, which named its points otherwise, goes on under its names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-books-lr").mkdir(parents=True)
    SweepRecord([SweepPoint("tiny-books-lr-lr1", {"optim.lr": "1"})]).save(tmp_path / "runs" / "tiny-books-lr")
    points = compose_points([*TINY, "optim.lr=1,2"])
    assert names(points) == ["tiny-books-lr-lr1", "tiny-books-lr2"]
    assert "run.name=tiny-books-lr-lr1" in points[0].overrides


def test_keys_with_the_same_last_part_stay_distinct_and_long_values_are_cut():
    assert point_suffix({"data.name": "a", "engine.name": "b"}) == "data.name_a-engine.name_b"
    one, other = (point_suffix({"tokenizer.path": "x" * 300 + end}) for end in "ab")
    assert len(one) == len(other) == MAX_SUFFIX and one != other


def test_a_name_that_needs_quotes_gets_them():
    assert quoted("run.name", "scan-lr0.1") == "run.name=scan-lr0.1"
    assert quoted("run.name", "a, b") == "run.name='a, b'"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "-m"], "--multirun: no key has several values; give some, as in optim.lr=1e-3,3e-4"),
        (["train", "-m", "seed=1"], "--multirun: no key has several values"),
        (["train", "-m", "run.name=a,b"], "run.name cannot be swept: it names the sweep"),
        (["train", "-m", "run.dir=a,b"], "run.dir cannot be swept"),
        (["train", "-m", "launch=local,slurm"], "launch cannot be swept: all runs are started in the same way"),
        (["train", "-m", "seed=1,2", "run.sweep=x"], "run.sweep=x: --multirun sets it"),
        (["train", "-m", "seed=1,2", "run.name=a/b"], "run.name='a/b' cannot be the name of a folder"),
        (["train", "-m", "optim.lr=interval(0,1)"], "an interval is continuous; give single values: a,b,c"),
        (["train", "-m", "optim.lr=range(1,2,0)"], "optim.lr=range(1,2,0): "),
        (["train", "-m", "seed=range(10000)"], f"more than {MAX_POINTS} points (seed {MAX_POINTS + 1})"),
        (
            ["train", "-m", "seed=range(40)", "train.steps=range(1,41)"],
            "more than 1000 points (seed 40 x train.steps 40)",
        ),
        (["train", "-m", "seed=1,1"], "points 1 (seed=1) and 2 (seed=1) are the same"),
        (["train", "-m", "optim.lr=1,1.0"], "points 1 (optim.lr=1) and 2 (optim.lr=1.0) are the same"),
        (["train", "-m", "seed=1,2", "train.stepz=1"], "unknown key train.stepz; did you mean train.steps?"),
        (["train", "-m", "model=tiny,tinny"], "point 2 of 2 (model=tinny): unknown choice model=tinny; did you mean"),
        (
            ["train", "-m", "seed=1,2", "model.num_heads=4,8,7", "model.num_kv_heads=null"],
            "point 3 of 6 (seed=1 model.num_heads=7): model.hidden_size=320 is not divisible by model.num_heads=7",
        ),
        (
            ["train", "-m", "train.global_batch_size=8,6", "train.micro_batch_size=4"],
            "point 2 of 2 (train.global_batch_size=6): train.global_batch_size=6 is not divisible",
        ),
        (["train", "-m", "parallel.tp=1,3"], "point 2 of 2 (parallel.tp=3): "),
        (["train", "-m", "data.name=,books"], "cannot read data.name=,books: a sweep takes a,b,c"),
        (
            ["train", "-m", "data.name=nowhere,books"],
            "point 1 of 2 (data.name=nowhere): there is no data",
        ),
        (["train", "-m", "seed=1,2", "launch.num_nodes=2"], "point 1 of 2 (seed=1): launch.num_nodes=2: a plain start"),
        (["prepare", "-m", "seed=1,2"], "--multirun runs a sweep of training runs: use train or tune"),
        (
            ["train", "seed=1,2"],
            "seed=1,2: several values make a sweep, which only megatrain train and tune",
        ),
    ],
)
def test_a_mistake_is_reported_before_anything_starts(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.Popen", None)
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("megatrain: error: ") and says in shown and shown.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_sweep_inside_a_job_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["train", "-m", "seed=1,2"]) == 2
    assert "cannot be part of one" in capsys.readouterr().err


def test_cfg_and_dry_run_show_every_point_and_do_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megatrain.verbs.path_checks.check_paths", lambda *_: None)
    words = ["train", "--multirun", *TINY, "seed=1,2", "run.name=two words"]
    assert cli.main([*words, "--cfg"]) == 0
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [(one["seed"], one["run"]["name"]) for one in shown] == [(1, "two words-seed1"), (2, "two words-seed2")]
    assert cli.main([*words, "--dry-run", "--debug"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("megatrain train --debug model=tiny") and "seed=1" in lines[0]
    assert not any(tmp_path.iterdir())


def test_a_sweep_and_a_run_do_not_share_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "megatrain.verbs.path_checks.check_dataset_folder",
        lambda *arguments: SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=300), has_pairs=False),
    )
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    SweepRecord([SweepPoint("mine-seed1", {"seed": "1"})]).save(tmp_path / "runs" / "mine")
    assert cli.main(["train", *TINY, "run.name=mine"]) == 2
    assert "runs/mine is the folder of a sweep" in capsys.readouterr().err
    (tmp_path / "runs" / "run").mkdir()
    (tmp_path / "runs" / "run" / "config.yaml").touch()
    assert cli.main(["train", "-m", *TINY, "run.name=run", "seed=1,2"]) == 2
    assert "runs/run is a run's folder; give the sweep another run.name" in capsys.readouterr().err


def test_the_record_grows_and_keeps_its_identity(tmp_path):
    record = SweepRecord([SweepPoint("s-a_b", {"data.dir": "a/b"})])
    record.save(tmp_path)
    again = SweepRecord.load(tmp_path)
    again.add([SweepPoint("s-c", {"data.dir": "c"}), SweepPoint("s-a_b", {"data.dir": "a/b"})])
    assert again.id == record.id and [point.run for point in again.points] == ["s-a_b", "s-c"]
    with pytest.raises(ConfigError, match=r"'data\.dir=a/b' and 'data\.dir=a_b' would both be the run s-a_b"):
        again.add([SweepPoint("s-a_b", {"data.dir": "a_b"})])


def test_simultaneous_commands_lose_no_points(tmp_path, monkeypatch):
    """Two shells extend the same sweep; the first reader of the record must finish before the other reads it."""
    monkeypatch.chdir(tmp_path)
    sweeps = [compose_points([*TINY, "run.name=scan", f"seed={2 * n},{2 * n + 1}"]) for n in range(4)]
    load = SweepRecord.load

    def slowly(folder):
        record = load(folder)
        time.sleep(0.05)
        return record

    monkeypatch.setattr(SweepRecord, "load", staticmethod(slowly))
    with ThreadPoolExecutor(len(sweeps)) as pool:
        list(pool.map(write_record, sweeps))
    points = load(tmp_path / "runs" / "scan").points
    assert sorted(point.run for point in points) == [f"scan-seed{seed}" for seed in range(8)]

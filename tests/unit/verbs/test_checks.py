"""Configs that are refused because keys contradict each other or because a path does not exist."""

import copy
import os
import re
from pathlib import Path

import pytest

from megatrain.config.compose import compose, read_overrides
from megatrain.data.card import Card
from megatrain.data.preparation import prepare
from megatrain.errors import ConfigError, EnvironmentFault
from megatrain.verbs.path_checks import check_installed, check_paths
from megatrain.verbs.value_checks import check_values

SHAPE = ["model=tiny", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=null", "model.max_seq_len=256"]
SIZES = ["train.global_batch_size=8", "train.micro_batch_size=4", "train.seq_len=256", "train.steps=100"]


@pytest.fixture(scope="module")
def base():
    """Return a valid train config, composed once."""
    return compose("train", SHAPE + SIZES)


def changed(base, overrides):
    """Return a copy of a config with some keys changed."""
    config = copy.deepcopy(base)
    for name, value in read_overrides("train", list(overrides)).values.items():
        group, _, key = name.rpartition(".")
        setattr(getattr(config, group) if group else config, key, value)
    return config


def refusal(check, config) -> str:
    """Return the message with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        check(config)
    return str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["launch.nproc_per_node=2"],
        ["model.num_heads=3", "model.head_size=16"],
        ["model.num_kv_heads=2"],
        ["model.hidden_size=60", "model.position=learned"],
        ["train.batch_ramp_start=4", "train.batch_ramp_increment=4", "train.batch_ramp_steps=10"],
        ["optim.warmup_steps=100"],
        ["train.early_stop_patience=2", "train.eval_every=10"],
        ["train.skip_ranges=[[0,8],[8,16],[100,101]]"],
        ["model.rope_scaling=llama3", "model.rope_factor=8", "model.rope_original_seq_len=64"],
        ["model.rope_scaling=yarn", "model.rope_factor=4", "model.rope_beta_fast=16", "model.rope_truncate=false"],
        ["model.qk_norm=true", "model.qk_norm_over=heads", "model.norm_place=after"],
        *([f"launch.time={limit}"] for limit in ("90", "90:30", "12:00:00", "1-12", "1-12:30", "1-12:30:00", "0")),
        ["launch.time=UNLIMITED"],
    ],
)
def test_keys_that_agree_pass(base, overrides):
    check_values(changed(base, overrides))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["model.num_heads=3"],
            "hidden_size=64 is not divisible by model.num_heads=3; nearest that work: 2 or 4; all: 1, 2, 4",
        ),
        (
            ["resilience.slow_rank_ratio=1"],
            "slow_rank_ratio=1 would report ranks that are as fast as the others; give more",
        ),
        (
            ["kernels=triton", "model.hidden_size=16640", "model.num_heads=4"],
            "kernels=triton supports a model.hidden_size of at most 16384, given 16640; use kernels=auto",
        ),
        (["model.num_kv_heads=3"], "num_heads=4 is not divisible by model.num_kv_heads=3; nearest that work: 2 or 4"),
        (["model.hidden_size=60"], "the head size must be even; it is 15; .*: 1, 2, 3, 5, 6, 10, 15, 30"),
        (["model.head_size=7"], "size must be even; it is 7; give model.head_size=8"),
        (["model.rope_scaling=yarn"], "rope_scaling=yarn needs a factor; give for example model.rope_factor=8"),
        (["model.rope_factor=8"], "rope_factor=8 has no effect .*=null; give .*=linear or dynamic or llama3 or yarn"),
        (
            ["model.rope_scaling=linear", "model.rope_factor=2", "model.rope_beta_fast=9"],
            "rope_beta_fast=9 has no effect with model.rope_scaling=linear; give model.rope_scaling=yarn, or leave",
        ),
        (["model.rope_scaling=linear", "model.rope_factor=2", "model.position=learned"], "needs model.position=rope"),
        (
            ["model.rope_scaling=llama3", "model.rope_factor=8", "model.rope_low_freq_factor=4"],
            "rope_high_freq_factor=4 must be above model.rope_low_freq_factor=4; the usual values are 4 and 1",
        ),
        (
            ["model.rope_scaling=yarn", "model.rope_factor=8", "model.rope_beta_slow=64"],
            "rope_beta_fast=32 must not be below model.rope_beta_slow=64",
        ),
        (
            ["model.rope_scaling=dynamic", "model.rope_factor=8", "model.head_size=2"],
            "rope_scaling=dynamic needs a head size above 2; give for example model.head_size=4",
        ),
        (["model.rope_scaling=yarn", "model.rope_factor=8", "model.rope_theta=1"], "rope_theta other than 1"),
        (["model.qk_norm_over=heads"], "qk_norm_over=heads needs model.qk_norm=true, which is false"),
        (["train.seq_len=257"], "train.seq_len=257 is longer.*train.seq_len=256 or model.max_seq_len=257"),
        (
            ["train.global_batch_size=9"],
            r"=9 .*=4 x 1 .* = 4; .*: train.global_batch_size=8 or 12, or train.micro_batch_size=3 or 9$",
        ),
        (["train.micro_batch_size=100"], r"work: train.micro_batch_size=8, or train.global_batch_size=100$"),
        (["train.micro_batch_size=3"], r"global_batch_size=6 or 9, or train.micro_batch_size=2 or 4$"),
        (
            ["train.micro_batch_size=3", "launch.nproc_per_node=4"],
            r"= 12; nearest that work: train.micro_batch_size=2, or train.global_batch_size=12$",
        ),
        (
            ["launch.nproc_per_node=3"],
            r"=8 .*=4 x 3 data-parallel ranks = 12; .* works: train.global_batch_size=12, or start 2 ranks "
            r"\(launch.nproc_per_node=2\)$",
        ),
        (
            ["launch.nproc_per_node=3", "train.micro_batch_size=1"],
            r"or start 2 or 4 ranks \(launch.nproc_per_node=2 or 4\)$",
        ),
        (
            ["launch.nproc_per_node=7", "parallel.tp=2", "train.micro_batch_size=1"],
            r"7 ranks are not divisible by .* = 2; start 4 or 8 ranks \(launch.nproc_per_node=4 or 8\)$",
        ),
        (
            ["launch.nproc_per_node=3", "launch.num_nodes=2", "parallel.tp=4", "train.micro_batch_size=1"],
            r"6 ranks are not divisible by .* = 4; start 4 or 8 ranks "
            r"\(launch.nproc_per_node=2 or 4\)$",
        ),
        (
            ["launch.nproc_per_node=4", "parallel.tp=3", "engine.name=native"],
            r"4 ranks are not divisible by parallel.tp=3 .* = 3; give parallel.tp=2 or 4$",
        ),
        (
            ["launch.nproc_per_node=6", "parallel.tp=3", "train.global_batch_size=24", "engine.name=native"],
            r"model.num_heads=4 is not divisible by parallel.tp=3; give parallel.tp=2$",
        ),
        (["train.batch_ramp_start=2", "train.batch_ramp_steps=9"], r"train.batch_ramp_start=2 .* is not divisible"),
        (
            ["train.batch_ramp_start=4", "train.batch_ramp_increment=2", "train.batch_ramp_steps=9"],
            r"the batch ramp's size 6 .*train.batch_ramp_increment=\d+\) is not .*: a batch size of 4 or 8, or "
            r"train.micro_batch_size=2$",
        ),
        (["train.batch_ramp_start=4"], "a ramp needs both; give train.batch_ramp_steps too"),
        (["train.batch_ramp_steps=4"], "a ramp needs both; give train.batch_ramp_start too"),
        (["train.batch_ramp_start=16", "train.batch_ramp_steps=9"], "batch_ramp_start=16 is above"),
        (["optim.warmup_steps=101"], "optim.warmup_steps=101 is more than train.steps=100"),
        (["train.reset_positions=true"], "give train.mask_documents=true too"),
        (["train.early_stop_patience=2"], "train.eval_every=0 runs none; give for example train.eval_every=10"),
        (["checkpoint.init_from=a", "checkpoint.resume=b"], "give one of them"),
        (["train.skip_ranges=[[1,2,3]]"], r"\[1, 2, 3\] is not a pair; give the first .* to keep"),
        (["train.skip_ranges=[[5,5]]"], r"\[5,5\] is not a range of samples"),
        (
            ["train.skip_ranges=[[5,99999999999999999999]]"],
            r"is not a range of samples; .* at most 4611686018427387904",
        ),
        (["train.skip_ranges=[[-1,5]]"], r"\[-1,5\] is not a range of samples; the first number must be at least 0"),
        (["train.skip_ranges=[[8,16],[0,4]]"], r"\[0,4\] begins before 16, .* in ascending order"),
        (["train.skip_ranges=[[8,16],[12,20]]"], r"\[12,20\] begins before 16"),
        (["run.name=a/b"], "run.name='a/b' cannot be the name of a folder"),
        (["run.name=.."], "run.name='..' cannot"),
        (["run.name="], "run.name='' cannot"),
        (["data.name=../x"], "data.name='../x' cannot"),
        (
            ["launch.sbatch_options=[qos=high]"],
            "'qos=high' does not begin with -, so sbatch would take it for the script",
        ),
        *(
            (
                ["launch.nproc_per_node=8", "launch.device=cuda", f"launch.sbatch_options=[{option}]"],
                f"{option} asks for 4 GPUs a node, fewer than launch.nproc_per_node=8 ranks; give .*=4, or ask for 8",
            )
            for option in ("--gpus-per-node=4", "--gpus-per-node=h100:4", "--gres=gpu:4", "--gres=gpu:h100:4")
        ),
        *(
            ([f"launch.time={limit!r}"], f"launch.time='{limit}' is not a time limit .*12:00:00")
            for limit in ("soon", "1h", "-5", "1.5", "1-", "1-2-3", "1:2:3:4", "::", "", "1 00:00", "٣")
        ),
    ],
)
def test_contradicting_keys_are_refused_with_the_nearest_values_that_work(base, overrides, says):
    assert re.search(says, refusal(check_values, changed(base, overrides)))


def test_another_launchers_world_size_takes_precedence(base, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "x 3 data-parallel ranks = 12" in refusal(check_values, changed(base, ["launch.nproc_per_node=2"]))


def test_an_empty_source_is_refused():
    assert "data.paths=[]" in refusal(check_values, compose("prepare", ["data=files"]))
    assert "data.hf_path=null" in refusal(check_values, compose("prepare", ["data.kind=huggingface"]))
    words = ["data=python_stdlib", "clean.minhash.bands=1000", "clean.minhash.rows=11"]
    assert "11,000 hashes a document; give at most 10,000" in refusal(check_values, compose("prepare", words))
    words = ["data=files", "data.paths=[a.txt]", "clean.name=../x"]
    assert "clean.name=../x: a recipe's name has no slashes; clean=../x" in refusal(
        check_values, compose("prepare", words)
    )
    check_values(compose("prepare", ["data=files", "data.paths=[a.txt]"]))


def test_a_missing_dataset_is_refused_with_the_command_that_makes_it(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(check_paths, changed(base, ["data.name=python_stdlib"]))
    assert "no dataset at data/python_stdlib" in message and "megatrain prepare data=python_stdlib" in message
    (tmp_path / "data" / "python_stdlib").mkdir(parents=True)
    (tmp_path / "data" / "python_stdlib" / "card.json").write_text("{}")
    assert "did you mean data.name=python_stdlib?" in refusal(check_paths, changed(base, ["data.name=python_stdlb"]))


@pytest.mark.parametrize(
    ("words", "missing", "says"),
    [
        (["precision.name=fp8"], "torchao", r"precision=fp8 needs torchao: pip install '\.\[fp8\]'"),
        (["kernels=triton"], "triton", "kernels=triton needs Triton.*kernels=auto"),
    ],
)
def test_a_missing_library_is_reported_before_anything_starts(base, words, missing, says, monkeypatch):
    config = changed(base, words)
    monkeypatch.setattr("megatrain.verbs.path_checks.find_spec", lambda name: object())
    check_installed(config)
    monkeypatch.setattr("megatrain.verbs.path_checks.find_spec", lambda name: None if name == missing else object())
    check_installed(base)
    with pytest.raises(EnvironmentFault, match=says) as caught:
        check_installed(config)
    assert caught.value.exit_code == 8


def test_documents_of_a_dataset_without_a_tokenizer_cannot_be_kept_apart(base, tmp_path, monkeypatch):
    card = Card(name="mine", fingerprint="", splits={}, tokenizer=None)
    monkeypatch.setattr("megatrain.verbs.path_checks.check_dataset", lambda folder: card)
    (tmp_path / "mine").mkdir()
    words = [f"data.dir={tmp_path}", "data.name=mine", "model.vocab_size=400"]
    check_paths(changed(base, words))
    message = refusal(check_paths, changed(base, [*words, "train.mask_documents=true"]))
    assert "train.mask_documents=true: " in message and "tokenizer.path=" in message


@pytest.mark.parametrize(
    ("verb", "overrides", "says"),
    [
        ("train", ["checkpoint.resume=auot"], "checkpoint.resume=auot: no such file or folder; did you mean auto"),
        ("train", ["checkpoint.init_from=runs/mine/x"], r"init_from=runs/mine/x: no such .* holds checkpoints\)"),
        ("evaluate", ["path=runs/mime"], r"path=runs/mime: no such file or folder; did you mean runs/mine\?"),
        ("evaluate", ["path=runs/mine", "data=book.txt"], "data=book.txt: no such file or folder"),
        ("generate", ["path=nowhere/at/all"], "path=nowhere/at/all: no such file or folder .* holds runs"),
        ("inspect", ["path=x"], "path=x: no such"),
        ("report", ["path=x"], "path=x: no such"),
        ("report", ["path=runs/mlflow"], r"path=runs/mlflow: no such file or folder \(.*runs holds mine\)"),
        ("train", ["checkpoint.init_from=runs/logs/x"], r"runs/logs/x: no such file or folder \(.* holds none\)"),
        ("evaluate", ["path=runs/mine", "data=runs/x"], r"holds logs, mine, mlartifacts, mlflow.db\)"),
        ("train", ["data.kind=files", "data.paths=[a.txt,no/*.txt]"], "data.paths: 'no/.*' matches no file"),
        ("train", ["tokenizer.path=no.model"], "tokenizer.path=no.model: no such"),
        ("prepare", ["data=files", "data.paths=[runs,no/*.txt]"], "data.paths: 'no/.*' matches no file"),
        ("prepare", ["data=huggingface", "data.hf_path=./no"], "data.hf_path=no: no such"),
        ("export", ["path=x", "out=y"], "path=x: no such"),
        ("import", ["path=x", "out=y"], "path=x: no such"),
        ("merge", ["paths=[runs/mine,runs/mime]", "out=y"], r"paths=runs/mime: no such .* did you mean runs/mine\?"),
        ("generate", ["path=runs/mine", "ensemble=[x]"], "ensemble=x: no such"),
        ("export", ["path=runs/mine", "out=runs"], "out=runs exists already"),
        ("import", ["path=runs/mine", "out=runs"], "out=runs exists already"),
        ("prepare", ["tokenizer.path=no.model"], "tokenizer.path=no.model: no such"),
        ("prepare", ["tokenizer.kind=hf", "tokenizer.path=./gpt2"], "tokenizer.path=gpt2: no such"),
    ],
)
def test_a_missing_path_is_refused_with_similar_paths(base, verb, overrides, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    for name in ("logs/x.log", "mlartifacts/x", "mlflow.db"):
        (tmp_path / "runs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "runs" / name).touch()
    (tmp_path / "a.txt").touch()
    config = changed(base, overrides) if verb == "train" else compose(verb, overrides)
    assert re.search(says, refusal(check_paths, config))


def test_a_hugging_face_name_is_not_mistaken_for_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "org/name-2.5"):
        check_paths(compose("prepare", ["tokenizer.kind=hf", f"tokenizer.path={name}"]))


@pytest.mark.parametrize(
    ("verb", "words", "says"),
    [
        ("prepare", ["data=files", "data.paths=[pipe]", "data.name=x"], "data.paths: pipe is a FIFO"),
        ("prepare", ["data=files", "data.paths=[/dev/null]", "data.name=x"], "data.paths: /dev/null is a device"),
        (
            "prepare",
            ["data=files", "data.paths=[t.txt]", "data.name=x", "tokenizer.path=pipe"],
            "tokenizer.path: pipe is a",
        ),
        ("inspect", ["path=pipe"], "path: pipe is a FIFO"),
        ("train", ["--config=pipe"], "pipe is a FIFO .* which can be read only once"),
        ("train", ["model=pipe"], "pipe"),
        (
            "prepare",
            [
                "data=files",
                "data.paths=[t.txt]",
                "data.name=x",
                "clean.steps=[{url_filter:{lists:none,domains:[pipe]}}]",
            ],
            r"url_filter.domains\[0\]: pipe is a FIFO",
        ),
    ],
)
def test_a_fifo_or_a_device_is_refused_and_not_waited_for(verb, words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("t.txt").write_text("text")
    with pytest.raises(ConfigError, match=says):
        config = compose(verb, words)
        check_paths(config)
        prepare(config)


def test_a_name_with_control_characters_is_told_so(base):
    with pytest.raises(ConfigError, match=r"run.name='a.x1bb' cannot be .* no control characters"):
        check_values(changed(base, ["run.name=a\x1bb"]))

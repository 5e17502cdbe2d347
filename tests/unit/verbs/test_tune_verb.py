"""What `megatrain tune` makes of its words: those of `train`, with what the base, the data and the method imply."""

import math
import shutil

import pytest

from megatrain.checkpoint.manifest import read_manifest, write_manifest
from megatrain.config import CompressConfig
from megatrain.config.compose import compose
from megatrain.data.card import Card, fingerprint
from megatrain.errors import ConfigError
from megatrain.verbs import tune
from megatrain.verbs.compress import compress
from megatrain.verbs.start_checks import with_checkpoint_model
from megatrain.verbs.sweep_points import compose_points
from megatrain.verbs.value_checks import check_values


@pytest.fixture
def words(finished, dataset, tmp_path):
    """Return a function that gives the words of `train` for a tuning of the finished run on the dataset."""

    def of(*further, base=finished, data=True):
        place = (f"data.dir={dataset.parent}", f"run.dir={tmp_path}", *([f"data.name={dataset.name}"] * data))
        return tune.train_words([f"path={base}", "train.seq_len=16", *place, *further], make=True)

    return of


def config_of(words):
    config = compose("train", with_checkpoint_model("train", words))
    check_values(config)
    return config


def test_the_base_the_method_and_the_data_give_the_rest(words, finished, dataset):
    config = config_of(words())
    assert (config.run.name, config.method.name, config.data.name) == ("first-sft", "sft", dataset.name)
    assert config.checkpoint.init_from == str(finished)
    assert (config.optim.lr, config.optim.weight_decay, config.data.kind) == (2e-5, 0.0, "chat")
    assert config.data.packing == "best_fit" and config.train.mask_documents and config.train.reset_positions
    epoch = config.train.eval_every
    assert config.train.steps in range(3 * (epoch - 1) + 1, 3 * epoch + 1)
    assert config.optim.warmup_steps == math.ceil(0.03 * config.train.steps)
    assert config.engine.name == "deepspeed"
    many = config_of(words(f"train.steps={100 * epoch}"))
    assert many.train.eval_every == 2 * epoch  # 50 times
    low_rank = config_of(words("method.lora.rank=2", "method.epochs=1"))
    assert (low_rank.optim.lr, low_rank.engine.name) == (1e-4, "native")
    assert low_rank.train.steps in range(epoch - 1, epoch + 1)


def test_a_sweep_has_runs_of_train_that_begin_from_the_base(finished, dataset, tmp_path):
    place = [f"path={finished}", "train.seq_len=16", f"data.dir={dataset.parent}", f"run.dir={tmp_path}"]
    points = compose_points([*place, f"data.name={dataset.name}", "optim.lr=1e-4,3e-4"], "tune", make=True)
    assert [point.config.run.name for point in points] == ["first-sft-lr0.0001", "first-sft-lr0.0003"]
    for point, lr in zip(points, (1e-4, 3e-4), strict=True):
        config = config_of(point.overrides)
        assert (config.optim.lr, config.run.sweep, config.checkpoint.init_from) == (lr, "first-sft-lr", str(finished))
        assert config == point.config and config.method.name == "sft"
    folds = [*place, "data.paths=[talks.jsonl]", "data.folds=3"]
    with pytest.raises(ConfigError, match=r"point 1 of 2 .data.fold=1.: data.folds=3: method=grpo has no held-out"):
        compose_points([*folds, "data.fold=1,2", "method=grpo"], "tune")


def test_what_is_given_counts(words):
    given = ("train.steps=7", "optim.lr=0.5", "optim.warmup_steps=2", "train.eval_every=0", "run.name=x", "seed=9")
    config = config_of(words(*given, "data.packing=concatenate"))
    assert (config.train.steps, config.optim.lr, config.optim.warmup_steps, config.train.eval_every) == (7, 0.5, 2, 0)
    assert (config.run.name, config.seed, config.data.packing) == ("x", 9, "concatenate")


def test_without_held_out_data_nothing_is_evaluated(words, dataset, tmp_path):
    card = Card.load(dataset)
    del card.splits["heldout"]
    card.fingerprint = fingerprint(card.splits)
    shutil.copytree(dataset, tmp_path / "all")
    card.save(tmp_path / "all")
    assert config_of(words(f"data.dir={tmp_path}", "data.name=all")).train.eval_every == 0


def test_another_dropout_than_the_bases_is_meant_and_other_keys_of_the_model_must_be_named(words):
    given = config_of(words("model.dropout=0.25", "checkpoint.override=[optim.lr]"))
    assert (given.model.dropout, given.checkpoint.override) == (0.25, ["optim.lr", "model.dropout"])
    assert config_of(words()).checkpoint.override == []


def test_a_run_that_is_made_longer_keeps_the_warm_up_that_it_began_with(words, finished, tmp_path):
    again = ("run.name=again", "train.steps=400", "run.dir=" + str(tmp_path))
    assert config_of(words(*again)).optim.warmup_steps == 12
    shutil.copytree(finished, tmp_path / "again")
    (newest,) = sorted((tmp_path / "again" / "checkpoints").glob("step_*"))[-1:]
    manifest = read_manifest(newest)
    manifest.identity.config["optim"]["warmup_steps"] = 5
    write_manifest(newest, manifest)
    assert config_of(words(*again)).optim.warmup_steps == 5


def test_a_pruned_base_stays_pruned_unless_it_is_said_otherwise(words, finished, tmp_path, capsys):
    compress(CompressConfig(path=str(finished), out=str(tmp_path / "sparse"), to="2:4", compare=False))
    base = tmp_path / "sparse"
    assert not config_of(words()).optim.keep_zeros
    assert config_of(words(base=base)).optim.keep_zeros
    assert "its zeros stay (optim.keep_zeros=true)" in capsys.readouterr().err
    assert not config_of(words("optim.keep_zeros=false", base=base)).optim.keep_zeros
    assert not config_of(words("method.lora.rank=2", base=base)).optim.keep_zeros
    assert "low-rank layers fill its zeros" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"optim.keep_zeros=true: low-rank layers .method.lora.rank=2. fill"):
        words("method.lora.rank=2", "optim.keep_zeros=true")


def test_distillation_of_conversations_keeps_them_whole(words, finished):
    config = config_of(words("method=distill", f"method.teacher={finished}"))
    assert (config.method.name, config.optim.lr, config.optim.weight_decay) == ("distill", 2e-5, 0.0)
    assert config.data.packing == "best_fit" and config.train.mask_documents and config.train.reset_positions


def test_a_checkpoint_of_a_run_has_the_runs_name(words, finished):
    newest = sorted((finished / "checkpoints").glob("step_*"))[-1]
    assert config_of(words(base=newest)).run.name == "first-sft"


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (["method=pretrain"], "method=pretrain is not a method of tuning"),
        (["checkpoint.init_from=elsewhere"], "begins from its first argument"),
        (["method.lora.rank=2", "method.lora.targets=[]"], r"method.lora.targets=\[\] names no projection"),
        (
            ["method.lora.rank=2", "engine=deepspeed", "parallel.tp=2", "launch.nproc_per_node=2"],
            "method.lora.rank=2 with parallel.tp=2 needs engine=native",
        ),
        (["method.label_smoothing=0.5", "method=dpo"], "less than 0.5"),
        (["data.mixture={a: 1, b: 1}", "data=mixture"], "several datasets have no common epoch"),
    ],
)
def test_what_cannot_be_is_refused(words, further, message):
    with pytest.raises(ConfigError, match=message):
        words(*further)


def test_a_base_that_is_none_and_data_that_are_missing_are_named(words, dataset):
    with pytest.raises(ConfigError, match="is a prepared dataset; give the base first"):
        words(base=dataset)
    with pytest.raises(ConfigError, match=r"give data.paths=\[talks.jsonl\], or data.name"):
        words(data=False)


def test_in_a_job_nothing_is_imported_or_prepared(words, family, monkeypatch, tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="must be imported first: megatrain import"):
        words(base=folder)
    shutil.rmtree(folder)

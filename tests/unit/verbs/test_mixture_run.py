"""A run on a mixture from start to end: its records, its resumes, and the verbs that read it."""

import contextlib
import json
import random
import shutil
from pathlib import Path

import pytest

from megatrain.checkpoint.manifest import read_manifest
from megatrain.config import EvaluateConfig
from megatrain.errors import CheckpointError, ConfigError, DataError
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import read_metrics
from megatrain.training.datasets import HeldoutShare, open_data
from megatrain.verbs.evaluate import evaluate
from megatrain.verbs.path_checks import check_paths


@pytest.fixture(scope="module")
def mixed(make_job, second_dataset):
    """Return a function that returns the config of a run on the datasets words and more."""

    def make(runs, steps=4, mixture=None, phases=(), override=()):
        config = make_job(runs, run__name="mixed", train__steps=steps, data__kind="mixture", data__name="both")
        more = str(second_dataset)
        config.data.mixture = mixture or {"words": 0.75, more: {"weight": 0.25, "max_epochs": 3}}
        config.data.phases, config.checkpoint.override = list(phases), list(override)
        return config

    return make


def texts(count, seed):
    words = random.Random(seed)
    return [" ".join(words.choices(["the", "model", "reads", "and", "writes"], k=40)) for _ in range(count)]


def hashes(run):
    return [record["batch_hash"] for record in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(mixed, run_job, tmp_path_factory):
    """A run of four steps without a break."""
    runs = tmp_path_factory.mktemp("whole")
    config = mixed(runs)
    check_paths(config)
    assert run_job(config) == 0
    return runs / "mixed"


def test_the_records_name_every_source(whole):
    last = read_metrics(whole / "metrics.jsonl")[-1]
    assert last["heldout_loss"] == pytest.approx(0.75 * last["heldout_loss/words"] + 0.25 * last["heldout_loss/more"])
    events = {event["kind"]: event for event in read_events(whole / "events.jsonl")}
    samples = {name: seen["samples"] for name, seen in events["mixture"]["sources"].items()}
    total = sum(samples.values())
    assert samples["words"] * 4 == total * 3 and events["evaluate"]["sources"] == events["mixture"]["sources"]
    manifest = read_manifest(whole / "checkpoints" / "step_00000004")
    assert manifest.identity.mixture.phases[0].weights == {"more": 1, "words": 3}
    assert manifest.progress.cursor == total
    assert manifest.identity.dataset_fingerprint == manifest.identity.mixture.fingerprint


def test_a_resumed_run_reads_what_the_undisturbed_one_reads(whole, mixed, run_job, tmp_path):
    assert run_job(mixed(tmp_path, steps=2)) == 0
    assert run_job(mixed(tmp_path)) == 0
    assert hashes(tmp_path / "mixed") == hashes(whole)


def test_a_resume_changes_the_future_alone_and_only_on_purpose(whole, mixed, run_job, tmp_path):
    assert run_job(mixed(tmp_path, steps=2)) == 0
    other = {"words": 1}
    with pytest.raises(CheckpointError, match=r"data.mixture was"):
        check_paths(mixed(tmp_path, mixture=other))
    changed = mixed(tmp_path, mixture=other, override=["data.mixture"])
    check_paths(changed)
    assert run_job(changed) == 0
    assert hashes(tmp_path / "mixed")[:2] == hashes(whole)[:2]
    assert hashes(tmp_path / "mixed")[2:] != hashes(whole)[2:]
    seen = [event for event in read_events(tmp_path / "mixed" / "events.jsonl") if event["kind"] == "mixture"]
    assert seen[0]["sources"]["more"]["samples"] == seen[1]["sources"]["more"]["samples"]


def open_files(*folders):
    """Return the files of these folders that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own descriptor is gone
            found.append(link.readlink())
    return [path for path in found if str(path.parent) in map(str, folders)]


def test_a_mixture_of_many_sources_has_few_files_open(mixed, dataset, second_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("megatrain.data.mixed_dataset._MAX_OPEN", 1)
    config = mixed(tmp_path)
    data = open_data(config)
    assert open_files(dataset, second_dataset) == []
    config.train.mask_documents = True
    data = open_data(config)
    assert len(open_files(dataset, second_dataset)) <= 1
    for name, split in data.heldout.items():
        assert list(HeldoutShare(name, 1, split, data.config, 0, 1, None).batches())
    assert len(open_files(dataset, second_dataset)) <= 1


@pytest.fixture(scope="module")
def unheld(tmp_path_factory, prepare, dataset):
    """A dataset without a held-out split."""
    return str(prepare(tmp_path_factory.mktemp("unheld") / "unheld", [dataset.name * 200], []))


def test_a_later_phase_weighs_the_held_out_loss_if_the_first_has_no_held_out_data(mixed, run_job, unheld, tmp_path):
    later = [{"from_step": 2, "mixture": {"words": 1}}]
    config = mixed(tmp_path, steps=2, mixture={unheld: 1}, phases=later)
    config.train.eval_every = 0
    assert run_job(config) == 0
    last = read_metrics(tmp_path / "mixed" / "metrics.jsonl")[-1]
    assert last["heldout_loss"] == last["heldout_loss/words"]


def test_a_new_mixture_weighs_the_held_out_loss_if_the_old_had_no_held_out_data(mixed, run_job, unheld, tmp_path):
    config = mixed(tmp_path, steps=2, mixture={unheld: 1})
    config.train.eval_every = 0
    assert run_job(config) == 0
    assert run_job(mixed(tmp_path, mixture={"words": 1}, override=["data.mixture"])) == 0
    last = read_metrics(tmp_path / "mixed" / "metrics.jsonl")[-1]
    assert last["heldout_loss"] == last["heldout_loss/words"]


@pytest.mark.parametrize(("mixture", "waited"), [(None, 1), ({"words": 1}, 0)])
def test_early_stopping_begins_again_if_the_held_out_loss_is_of_other_sources(
    mixed, run_job, tmp_path, mixture, waited
):
    for steps, override in ((2, []), (4, ["data.mixture"])):
        config = mixed(tmp_path, steps=steps, mixture=mixture if override else None, override=override)
        config.train.early_stop_min_delta = 1e9
        assert run_job(config) == 0
    manifest = read_manifest(tmp_path / "mixed" / "checkpoints" / "step_00000004")
    assert manifest.progress.early_stop.evaluations_without_gain == waited


def test_a_cap_is_checked_before_the_run(mixed, second_dataset, tmp_path):
    capped = {"words": 0.5, str(second_dataset): {"weight": 0.5, "max_epochs": 0.1}}
    with pytest.raises(ConfigError, match=r"data.mixture..*/more: max_epochs=0.1 allows"):
        check_paths(mixed(tmp_path, mixture=capped))


def evaluated(capsys, run, **keys):
    """Return what `evaluate` prints as JSON, and its lines for people."""
    capsys.readouterr()
    evaluate(EvaluateConfig(path=str(run), device="cpu", **keys))
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_evaluate_gives_each_source_and_the_mean_as_training_has_them(whole, dataset, second_dataset, capsys):
    last = read_metrics(whole / "metrics.jsonl")[-1]
    logged = [event for event in read_events(whole / "events.jsonl") if event["kind"] == "evaluate"][-1]
    found, lines = evaluated(capsys, whole)
    assert found["loss"] == pytest.approx(last["heldout_loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-6)
    assert found["perplexity"] == pytest.approx(logged["perplexity"], rel=1e-6)
    assert found["tokens"] == logged["tokens"] == sum(source["tokens"] for source in found["sources"].values())
    assert list(found["sources"]) == ["more", "words"]
    for name, folder in (("words", dataset), ("more", second_dataset)):
        source = found["sources"][name]
        assert source["loss"] == pytest.approx(last[f"heldout_loss/{name}"], rel=1e-6)
        alone, _ = evaluated(capsys, whole, data=str(folder))
        assert source.items() >= {key: alone[key] for key in ("loss", "bits_per_byte", "tokens", "bytes")}.items()
        assert f"  {name}: loss {source['loss']:.6f}, perplexity" in lines
    assert [found["sources"][name]["weight"] for name in ("words", "more")] == [0.75, 0.25]


def test_evaluate_takes_the_same_number_of_batches_of_each_source(whole, capsys):
    found, _ = evaluated(capsys, whole, max_batches=1, batch_size=2)
    assert {source["tokens"] for source in found["sources"].values()} == {2 * found["seq_len"]}
    train, _ = evaluated(capsys, whole, split="train", max_batches=1)
    assert train["loss"] != found["loss"] and "(train)" in train["data"]


def test_evaluate_leaves_out_sources_without_the_split(mixed, run_job, unheld, tmp_path, capsys):
    config = mixed(tmp_path, steps=2, mixture={unheld: 0.9, "words": 0.1})
    assert run_job(config) == 0
    found, _ = evaluated(capsys, tmp_path / "mixed")
    assert list(found["sources"]) == ["words"] and found["sources"]["words"]["weight"] == 1
    assert found["loss"] == found["sources"]["words"]["loss"]


def test_evaluate_refuses_a_source_that_is_gone_or_another(mixed, run_job, prepare, tmp_path):
    prepared = prepare(tmp_path / "own", texts(9, 3), texts(3, 4))
    config = mixed(tmp_path, steps=2, mixture={str(prepared): 1, "words": 1})
    assert run_job(config) == 0
    shutil.rmtree(prepared)
    with pytest.raises(ConfigError, match=r"own of the run's mixture does not exist; give data="):
        evaluate(EvaluateConfig(path=str(tmp_path / "mixed"), device="cpu"))
    prepare(tmp_path / "own", texts(9, 5), texts(3, 4))
    with pytest.raises(DataError, match=r"own is no longer the dataset that the model was trained on"):
        evaluate(EvaluateConfig(path=str(tmp_path / "mixed"), device="cpu"))

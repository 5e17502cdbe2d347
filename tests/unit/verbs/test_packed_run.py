"""A run on packed documents from start to end: its records, its resumes, and the verbs that read it."""

import json

import pytest

from megatrain.config import EvaluateConfig, InspectConfig, ReportConfig
from megatrain.errors import CheckpointError
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import read_metrics
from megatrain.verbs.evaluate import evaluate
from megatrain.verbs.inspect import inspect
from megatrain.verbs.path_checks import check_paths
from megatrain.verbs.report import report

PACKED = {
    "data__packing": "best_fit",
    "train__seq_len": 64,
    "train__mask_documents": True,
    "train__reset_positions": True,
}


def hashes(run):
    return [record["batch_hash"] for record in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(make_job, run_job, tmp_path_factory):
    """A run of four steps without a break; its dataset is packed before it starts, as the command does."""
    runs = tmp_path_factory.mktemp("whole")
    config = make_job(runs, **PACKED)
    check_paths(config)
    assert run_job(config) == 0
    return runs / "first"


def test_the_records_say_how_full_the_samples_are(whole, dataset, capsys):
    (packing,) = [event["packings"] for event in read_events(whole / "events.jsonl") if event["kind"] == "packing"]
    figures = packing[dataset.name]
    assert figures["documents"] == 20 and 0 < figures["padding_share"] < 0.5
    assert figures["cut_share"] < figures["cut_share_of_windows"] <= 1
    inspect(InspectConfig(path=str(dataset)))
    printed = capsys.readouterr().out
    assert f"{figures['padding_share']:.4%}" in printed and f"{figures['cut_share_of_windows']:.4%}" in printed


def test_the_report_of_a_packed_run_takes_its_packings_for_no_mixture(whole, tmp_path):
    report(ReportConfig(path=str(whole), out=str(tmp_path / "page.html")))
    assert "read of each source" not in (tmp_path / "page.html").read_text()


def test_the_tokens_of_a_step_are_its_labels_without_padding(whole):
    records = read_metrics(whole / "metrics.jsonl")
    assert 0 < records[-1]["tokens"] < 4 * 4 * 64


def test_a_resumed_run_reads_what_the_undisturbed_one_reads(whole, make_job, run_job, tmp_path):
    assert run_job(make_job(tmp_path, train__steps=2, **PACKED)) == 0
    assert run_job(make_job(tmp_path, **PACKED)) == 0
    assert hashes(tmp_path / "first") == hashes(whole)
    with pytest.raises(CheckpointError, match=r"data.packing was best_fit and is now concatenate"):
        run_job(make_job(tmp_path, **{**PACKED, "data__packing": "concatenate", "train__steps": 5}))


def test_evaluation_counts_positions_as_the_run_did(whole, capsys):
    trained = read_metrics(whole / "metrics.jsonl")[-1]["heldout_loss"]
    capsys.readouterr()
    evaluate(EvaluateConfig(path=str(whole)))
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(trained, rel=1e-6)


def test_the_sources_of_a_mixture_pack_their_own_documents(make_job, run_job, dataset, second_dataset, tmp_path):
    config = make_job(tmp_path, data__kind="mixture", data__name="both", **PACKED)
    config.data.mixture = {"words": 0.75, str(second_dataset): 0.25}
    check_paths(config)
    assert run_job(config) == 0
    events = {event["kind"]: event for event in read_events(tmp_path / "first" / "events.jsonl")}
    figures = events["packing"]["packings"]
    assert {name: found["documents"] for name, found in figures.items()} == {"words": 20, "more": 9}
    seen = events["mixture"]["sources"]
    assert {name: found["samples"] for name, found in seen.items()} == {"words": 12, "more": 4}
    assert seen["words"]["epochs"] == pytest.approx(12 / figures["words"]["samples"], abs=1e-4)

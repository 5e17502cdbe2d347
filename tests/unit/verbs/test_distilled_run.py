"""A run that distils a teacher, from start to end: what it records, and a resume that gives the same bits."""

from __future__ import annotations

import pytest

from megatrain.checkpoint.find import peek
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import read_metrics
from megatrain.verbs.path_checks import check_paths


@pytest.fixture(scope="module")
def how(tmp_path_factory, train_job):
    """The keys of a student, whose teacher is a wider model that has trained for a step."""
    runs = tmp_path_factory.mktemp("teachers")
    assert train_job(runs, run__name="big", model__hidden_size=64, train__steps=1) == 0
    student = {"method__name": "distill", "method__teacher": str(runs / "big"), "method__temperature": 2.0}
    return {**student, "train__eval_every": 2, "model__dropout": 0.1, "optim__schedule": "constant"}


def losses(run):
    return [[record[k] for k in ("loss", "cross_entropy", "divergence")] for record in read_metrics(run)]


def test_a_resumed_run_gives_the_same_bits_and_records(how, make_job, run_job, tmp_path):
    config = make_job(tmp_path / "whole", **how)
    check_paths(config)
    assert run_job(config) == 0
    assert run_job(make_job(tmp_path / "cut", **how, train__steps=2)) == 0
    assert run_job(make_job(tmp_path / "cut", **how)) == 0
    whole, cut = (losses(tmp_path / name / "first" / "metrics.jsonl") for name in ("whole", "cut"))
    assert whole[2:] == cut[2:] and len(cut) == 4
    for loss, cross_entropy, divergence in whole:
        assert loss == pytest.approx(0.5 * cross_entropy + 0.5 * 4 * divergence, rel=1e-5)
    run = tmp_path / "whole" / "first"
    ancestors = peek(run)[1].identity.ancestors
    assert [one.name for one in ancestors] == ["big"]
    (teacher,) = [event for event in read_events(run / "events.jsonl") if event["kind"] == "teacher"]
    assert teacher["model"].endswith("big/checkpoints/step_00000001") and teacher["parameters"] > 20_000
    evaluated = [event for event in read_events(run / "events.jsonl") if event["kind"] == "evaluate"]
    assert {"tokens", "perplexity", "heldout_divergence"} <= evaluated[-1].keys()
    assert evaluated[-1]["heldout_loss"] == pytest.approx(evaluated[-1]["heldout_cross_entropy"], rel=1e-6)

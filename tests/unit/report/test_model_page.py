"""The page of a merged model: its line in columns by generation, with the scores of the models that are still there."""

import re
import shutil

import pytest
from support.lines import make_checkpoint, make_run
from support.pages import BOX, drawn, measured, needs_browser, rows_of

from megatrain.config import ReportConfig
from megatrain.report.lineage_section import lineage as boxes_of
from megatrain.tracking.evaluation_records import records_folder, write_record
from megatrain.verbs.report import report


def scored(checkpoint, value):
    """Write a score of a checkpoint where `megatrain evaluate` does."""
    scores = [{"metric": "exact", "value": value, "stderr": 0.01, "higher_is_better": True}]
    write_record(records_folder(checkpoint), 5, "examples", "toy", {"documents": 400, "scores": scores})
    return checkpoint


@pytest.fixture
def merged(tmp_path):
    base = scored(make_run(tmp_path, "base"), 0.25)
    both = [scored(make_run(tmp_path, "left", base), 0.5), make_run(tmp_path, "<b>right", base)]
    return scored(make_checkpoint(tmp_path / "merged", "merged", *both, made_from={"by": "average"}), 0.75)


def test_a_model_of_two_is_one_generation_after_them(merged):
    assert [(box["name"], box["generation"]) for box in boxes_of(merged)] == [
        ("base", 0), ("left", 1), ("<b>right", 1), ("merged", 2),
    ]  # fmt: skip
    assert ["exact", "0.750 ± 0.010"] in boxes_of(merged)[3]["figures"], "kept in the checkpoint's own folder"


def test_figures_of_another_model_at_an_ancestors_place_are_not_shown(merged):
    place = merged.parent / "left" / "checkpoints" / "step_00000005"
    assert ["exact", "0.500 ± 0.010"] in boxes_of(merged)[1]["figures"]
    shutil.rmtree(place)
    assert ["exact", "0.500 ± 0.010"] in boxes_of(merged)[1]["figures"], "its run has retired the checkpoint"
    make_checkpoint(place, "another")
    assert not [name for name, _ in boxes_of(merged)[1]["figures"] if name == "exact"]


@needs_browser
def test_the_page_draws_generations_beside_one_another_and_below_on_a_telephone(merged, capsys):
    report(ReportConfig(path=str(merged)))
    page = merged / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    document = drawn(page)
    assert re.findall(r"<h3>(.*?)</h3>", document) == ["base", "left", "&lt;b&gt;right", "merged"]
    assert re.findall(r"<th>(.*?)</th>", document) == ["task", "metric", "base", "left", "merged", "documents"]
    assert re.findall(r'class="best">([\d.]+)', document) == ["0.7500"]
    boxes = f"[...document.querySelectorAll('.generation')].map({BOX})"
    left, middle, right = sorted(measured(page, boxes))
    assert left[2] < middle[0] and middle[2] < right[0]
    assert [len(row) for row in rows_of(measured(page, boxes, width=500))] == [1, 1, 1]

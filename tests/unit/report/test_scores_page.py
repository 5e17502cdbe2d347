"""Scores on a run's page and on the page of several models, drawn by a real browser."""

import re

from support.pages import drawn, needs_browser

from megatrain.report.run_page import report
from megatrain.report.scores_page import scores_of_run, scores_page, table_of
from megatrain.tracking.evaluation_records import write_record


def result(name, value, better=True, **further):
    score = {"metric": "acc", "value": value, "stderr": 0.05, "higher_is_better": better, "variant": "", **further}
    return {"name": name, "documents": 20, "scores": [score]}


def make_run(folder):
    (folder / "config.yaml").write_text("run: {name: demo}\n")
    for step, value in ((1000, 0.25), (2000, 0.75)):
        write_record(folder, step, "tasks", "<b>arc</b>", result("<b>arc</b>", value))
    write_record(folder, 2000, "tasks", "loss", result("loss", 2.5, better=False, interval=[2.0, 3.0]))
    (folder / "evaluations" / "step_00002000" / "broken.json").write_text("{")
    return folder


@needs_browser
def test_a_runs_page_has_a_column_for_each_checkpoint_and_marks_the_best_value(tmp_path):
    document = drawn(report(make_run(tmp_path)))
    table = re.search(r'<table class="scores">.*?</table>', document, re.DOTALL).group()
    assert re.findall(r"<th>(.*?)</th>", table) == ["task", "metric", "step 1,000", "step 2,000", "documents"]
    assert "&lt;b&gt;arc" in table and "acc ↑" in table and "acc ↓" in table
    assert re.findall(r'class="best">([\d.]+)', table) == ["0.7500"]
    assert "2.5000 <span>[2.0000, 3.0000]</span>" in table and "0.2500 <span>± 0.0500</span>" in table
    assert table.count("<td>–</td>") == 1


def test_a_run_without_evaluations_has_no_section_and_only_the_newest_steps_are_columns(tmp_path):
    assert scores_of_run(tmp_path) is None
    for step in range(1, 12):
        write_record(tmp_path, step, "tasks", "arc", result("arc", 0.5))
    assert scores_of_run(tmp_path)["columns"] == [f"step {step}" for step in range(4, 12)]


@needs_browser
def test_several_models_have_a_page_of_their_own(tmp_path):
    models = {"runs/a": [result("arc", 0.5)], "runs/b": [{**result("arc", 0.25), "detail": {"notes": ["3 <wins>"]}}]}
    document = drawn(scores_page(models, "a note", tmp_path / "page.html"))
    assert "Scores of runs/a and runs/b" in document and "a note" in document
    assert "runs/b: arc: 3 &lt;wins&gt;" in document
    assert re.findall(r'class="best">([\d.]+)', document) == ["0.5000"]
    assert table_of(models, "")["rows"][0]["cells"][1]["value"] == 0.25

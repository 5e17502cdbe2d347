"""The sweep report: one page, drawn by a real browser, for points in any state."""

import json
import os
import re

import pytest
import yaml
from support.pages import References, drawn, needs_browser

from megatrain import cli
from megatrain.config import ModelConfig
from megatrain.errors import DataError
from megatrain.model.count import flops_per_token, num_parameters
from megatrain.report.sweep_page import MAX_POINTS, collect, report_sweep, short_name
from megatrain.tracking.events import EventLog
from megatrain.tracking.metrics import MetricsLog
from megatrain.tracking.sweep_record import SweepPoint, SweepRecord

MODELS = {name: ModelConfig(name=name, hidden_size=width, vocab_size=400) for name, width in (("a", 32), ("b", 64))}


SHORT = ["a-lr0.001", "a-lr0.01", "b-lr0.001", "b-lr0.01"]


def make_point(runs, name, model, num_steps, lr="0.001", status=None, heldout=True):
    run_dir = runs / name
    run_dir.mkdir()
    config = {"model": vars(MODELS[model]), "train": {"seq_len": 32}, "optim": {"lr": float(lr)}, "seed": 7}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    log, events = MetricsLog(run_dir / "metrics.jsonl"), EventLog(run_dir / "events.jsonl")
    events.emit("start", 0)
    for step in range(1, num_steps + 1):
        record = {"step": step, "loss": 2 + 4 / step + float(lr), "tokens": 256 * step}
        if heldout and step % 10 == 0:
            record["heldout_loss"] = 2.5 + 4 / step + float(lr)
        log.append(record)
    if status is not None:
        events.emit("stop", num_steps, status=status)


@pytest.fixture
def sweep(tmp_path):
    """Write a sweep of four points: done, failed, still running, and not started."""
    points = {}
    for model in "ab":
        for lr in ("0.001", "0.01"):
            points[f"scan-{model}-lr{lr}"] = {"model": model, "optim.lr": lr}
    (tmp_path / "scan").mkdir()
    SweepRecord([SweepPoint(run, values) for run, values in points.items()]).save(tmp_path / "scan")
    make_point(tmp_path, "scan-a-lr0.001", "a", 40, status="done")
    make_point(tmp_path, "scan-a-lr0.01", "a", 15, "0.01", status="failed")
    make_point(tmp_path, "scan-b-lr0.001", "b", 20)
    return tmp_path / "scan"


def test_the_numbers_of_a_point_are_those_of_its_run(sweep):
    first, failed, running, waiting = collect(sweep)["points"]
    compute = 256 * flops_per_token(MODELS["a"], 32)
    assert (first["values"], first["tokens"], first["compute"]) == (
        ["a", "0.001"],
        40 * 256,
        40 * compute,
    )
    assert first["parameters"] == num_parameters(MODELS["a"]) < running["parameters"] == num_parameters(MODELS["b"])
    assert (first["loss"], first["heldout"]) == (pytest.approx(2.101), pytest.approx(2.601))
    assert [q[2] for q in first["train_curve"]] == list(range(1, 41))
    assert first["train_curve"][9] == [10 * compute, pytest.approx(2.401), 10]
    assert [q[2] for q in first["heldout_curve"]] == [10, 20, 30, 40]
    assert first["heldout_curve"][0][:2] == [10 * compute, pytest.approx(2.901)]
    texts = [point["status"]["text"] for point in (first, failed, running, waiting)]
    assert texts == ["done", "failed", "no end recorded", "not started"]
    assert [point["short"] for point in (first, waiting)] == ["a-lr0.001", "b-lr0.01"], "without the sweep's name"
    assert waiting["train_curve"] == [] and waiting["compute"] is None and waiting["parameters"] is None


@pytest.mark.parametrize(
    ("run", "sweep", "short"),
    [
        ("tiny-books-lr1e-05", "tiny-books-lr", "lr1e-05"),
        ("tiny-books-lr-lr1e-05", "tiny-books-lr", "lr1e-05"),  # as sweeps named their points before
        ("my-scan-seed1", "my-scan", "seed1"),
        ("books-tiny", "books-model", "tiny"),
        ("other", "scan", "other"),
        ("scan", "scan", "scan"),
    ],
)
def test_a_point_is_shown_without_what_it_shares_with_the_sweeps_name(run, sweep, short):
    assert short_name(run, sweep) == short


@needs_browser
def test_a_browser_draws_table_and_curves(sweep):
    document = drawn(report_sweep(sweep))
    assert re.search(r'data-drawn="(\d+)"', document).group(1) == "6"  # three begun points, training and held-out
    curves = re.findall(r'<path class="curve"[^>]* d="([^"]*)"', document)
    assert [curve.count("L") for curve in curves] == [39, 14, 19, 3, 0, 1] and "NaN" not in document
    table = re.search(r'<table id="points">(.*?)</table>', document, re.DOTALL).group(1)
    rows = [re.findall(r"<td[^>]*>(?:<i[^>]*></i>)?(.*?)</td>", row) for row in table.split("<tr")[2:]]
    assert [row[:2] for row in rows] == [["a", "0.001"], ["a", "0.01"], ["b", "0.001"], ["b", "0.01"]]
    assert [row[7] for row in rows] == ["done", "failed", "no end recorded", "not started"]
    assert rows[0][5:7] == ["2.101", "2.601"] and rows[3][2:7] == ["\u2013"] * 5
    best = re.findall(r'<td class="number +best">(.*?)</td>', table)
    assert best == ["2.101", "2.601"]
    links = [f'<a href="../scan-{run}/report.html" title="scan-{run}">{run}</a>' for run in SHORT[:3]]
    assert [row[8] for row in rows] == [*links, SHORT[3]]
    assert "1 of 4 done" in document and "model a, optim.lr 0.001" in document


def test_rows_link_to_the_pages_of_the_runs_written_anew_where_a_run_went_on(sweep, tmp_path):
    page = tmp_path / "scan-b-lr0.001" / "report.html"
    pages = [point["page"] for point in collect(sweep)["points"]]
    assert pages == [*(f"../scan-{run}/report.html" for run in SHORT[:3]), None] and page.exists()
    before = page.stat().st_mtime_ns
    (tmp_path / "else where").mkdir()
    pages = [point["page"] for point in collect(sweep, tmp_path / "else where")["points"]]
    assert pages[0] == "../scan-a-lr0.001/report.html" and page.stat().st_mtime_ns == before
    os.utime(page, (1, 1))
    collect(sweep)
    assert page.stat().st_mtime > 1


def along(points):
    """Return positions along an axis, on which equal factors must be equal distances."""
    return [[float(number) for number in pair.split()] for pair in re.split("[ML]", points)[1:]]


@needs_browser
def test_both_axes_are_logarithmic(tmp_path):
    (tmp_path / "scan").mkdir()
    SweepRecord([SweepPoint("scan-1", {"seed": "1"})]).save(tmp_path / "scan")
    make_point(tmp_path, "scan-1", "a", 0)
    log = MetricsLog(tmp_path / "scan-1" / "metrics.jsonl")
    for step in (1, 10, 100):
        log.append({"step": step, "loss": 800 / step, "tokens": 256 * step})
    (curve,) = re.findall(r'<path class="curve"[^>]* d="([^"]*)"', drawn(report_sweep(tmp_path / "scan")))
    (x0, y0), (x1, y1), (x2, y2) = along(curve)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2) and y1 - y0 > 50


@needs_browser
def test_hovering_highlights_one_point_and_a_click_sorts(sweep):
    """The test appends a pointer event and a click to the page's script."""
    page = report_sweep(sweep)
    script = """build();
      const c = document.querySelectorAll('path.curve')[2].getPointAtLength(1e9);
      const b = charts[0].plot.getBoundingClientRect();
      document.querySelectorAll('th')[1].click(); document.querySelectorAll('th')[1].click();
      charts[0].plot.dispatchEvent(new PointerEvent('pointermove', {clientX: b.left + c.x, clientY: b.top + c.y}));
    </script>"""
    page.write_text(re.sub(r"build\(\);\s*</script>", lambda _: script, page.read_text()))
    document = drawn(page)
    tip = re.search(r'<div class="tip" style="display: block[^>]*>(.*?)</section>', document, re.DOTALL).group(1)
    assert "model b, optim.lr 0.001" in tip and "<span>step</span><b>20</b>" in tip and "<b>2.201</b>" in tip
    classes = re.findall(r'<path class="(curve[^"]*)" data-point="(\d)"', document)
    assert [(one, "faded" in name) for name, one in classes] == [(i, i != "2") for i in "012012"]
    rows = re.findall(r'<tr data-point="(\d)"(?: class="(.*?)")?>', document)
    assert [one for one, _ in rows] == ["1", "3", "0", "2"], "the larger learning rate first, else as they were"
    assert [one for one, name in rows if name == "on"] == ["2"]


@needs_browser
def test_a_browser_draws_a_sweep_that_has_not_started(tmp_path):
    (tmp_path / "scan").mkdir()
    SweepRecord([SweepPoint("scan-1", {"seed": "1"})]).save(tmp_path / "scan")
    document = drawn(report_sweep(tmp_path / "scan"))
    assert "No steps recorded yet" in document and "not started" in document and "NaN" not in document


def test_the_page_fetches_nothing_and_no_name_ends_its_script(sweep):
    record = SweepRecord.load(sweep)
    record.points[0].values["model"] = "</script><script>alert(1)</script>"
    record.save(sweep)
    page = report_sweep(sweep).read_text()
    references = References()
    references.feed(page)
    assert references.found == [] and page.count("</script>") == 2 and "default-src 'none'" in page
    assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)


def test_a_key_without_an_override_is_read_from_the_points_config(sweep):
    record = SweepRecord.load(sweep)
    record.add([SweepPoint("scan-seed8", {"seed": "8"})])
    record.save(sweep)
    data = collect(sweep)
    assert data["keys"] == ["model", "optim.lr", "seed"]
    assert [point["values"] for point in data["points"]][::3] == [["a", "0.001", "7"], ["b", "0.01", None]]
    assert data["points"][4]["values"] == [None, None, "8"]


def test_damage_is_shown_beside_readable_points(sweep):
    with open(sweep.parent / "scan-a-lr0.001" / "metrics.jsonl", "ab") as file:
        file.write(b"\0\0\n{}\n")
    (sweep.parent / "scan-b-lr0.001" / "config.yaml").write_text("model: [")
    first, _, second, _ = collect(sweep)["points"]
    assert "line 41" in first["notice"] and first["loss"] == pytest.approx(2.101)
    assert second["compute"] is None and second["loss"] is not None and second["values"] == ["b", "0.001"]
    (sweep / "sweep.json").write_text("{}")
    with pytest.raises(DataError, match=r"sweep\.json: not the record of a sweep"):
        report_sweep(sweep)


def test_a_long_run_gives_few_points(tmp_path):
    (tmp_path / "scan").mkdir()
    SweepRecord([SweepPoint("scan-1", {"seed": "1"})]).save(tmp_path / "scan")
    make_point(tmp_path, "scan-1", "a", 0)
    rows = ({"step": step, "loss": 2.0, "tokens": step, "heldout_loss": 2.0} for step in range(1, 10_001))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "scan-1" / "metrics.jsonl").write_text(text)
    (point,) = collect(tmp_path / "scan")["points"]
    assert len(point["train_curve"]) <= MAX_POINTS and len(point["heldout_curve"]) <= MAX_POINTS
    assert point["tokens"] == 10_000


def test_the_report_verb_distinguishes_a_sweep_from_a_run(sweep, capsys):
    assert cli.main(["report", str(sweep), f"out={sweep}/page.html"]) == 0
    assert capsys.readouterr().out == f"{sweep}/page.html\n"
    assert "loss against compute" in (sweep / "page.html").read_text()
    assert cli.main(["report", str(sweep.parent / "scan-a-lr0.001")]) == 0
    assert "loss against compute" not in (sweep.parent / "scan-a-lr0.001" / "report.html").read_text()

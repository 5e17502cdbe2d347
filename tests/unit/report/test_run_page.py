"""The run report: one page, drawn by a real browser, for any state of a run folder."""

import json
import math
import re

import pytest
from support.pages import BOX, References, drawn, measured, needs_browser, rows_of

from megatrain.data.card import Card, SplitCard, fingerprint
from megatrain.errors import ConfigError
from megatrain.report import run_page as report_module
from megatrain.report.run_page import collect, report, schedule
from megatrain.resilience.owner import Ownership
from megatrain.tracking.events import EventLog
from megatrain.tracking.metrics import MetricsLog


def make_run(folder, num_steps, name="demo"):
    run_dir = folder / name
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(
        "run:\n  name: demo\nmodel:\n  name: tiny\n  num_layers: 2\ntrain:\n  steps: 300\n"
    )
    log, events = MetricsLog(run_dir / "metrics.jsonl"), EventLog(run_dir / "events.jsonl")
    events.emit("start", 0, world_size=2, layout="dp=2 zero=3", note="</script><script>alert(1)</script>")
    for step in range(1, num_steps + 1):
        record = {
            "step": step,
            "loss": math.nan if step == 7 else 2 + 6 / step,
            "grad_norm": 1 / step,
            "lr": 1e-3,
            "tokens": step * 512,
            "updated": step != 7,
            "step_time_s": 0.5,
            "tokens_per_s": 1024.0,
            "mfu": None,
            "data_time_s": 0.125,
            "eval_time_s": 0.25 if step % 10 == 0 else 0.0,
            "save_time_s": 0.0,
        }
        if step % 10 == 0:
            record["heldout_loss"] = 2.5 + 6 / step
            events.emit("evaluate", step, heldout_loss=record["heldout_loss"], bits_per_byte=1.5)
        log.append(record)
    events.emit("resume", num_steps // 2, world_size=1)
    return run_dir


def test_a_run_that_learns_from_rewards_shows_them(tmp_path):
    run_dir = make_run(tmp_path, 4)
    log = MetricsLog(run_dir / "metrics.jsonl")
    for step, reward in ((5, 0.25), (6, None), (7, 0.75)):
        found = {"reward": reward, "stop_rate": 1.0} if reward is not None else {}
        log.append({"step": step, "loss": 0.1, "tokens": step * 512, "updated": True, **found})
    page = collect(run_dir)
    assert page["curves"]["reward"]["mean"] == [None] * 4 + [0.25, None, 0.75]
    assert ["reward", "0.750", "last replies"] in [list(tile.values()) for tile in page["tiles"]]


@needs_browser
def test_a_browser_draws_every_chart(tmp_path):
    document = drawn(report(make_run(tmp_path, 60)))
    for title in ("Loss", "Learning rate", "Gradient norm", "Tokens per second", "Time per step", "Events"):
        assert f"<h2>{title}" in document, title
    assert re.search(r'data-drawn="(\d+)"', document).group(1) == "9"  # train, held-out, lr, norm, rate and four times
    curves = re.findall(r'<path class="curve"[^>]* d="([^"]*)"', document)
    assert len(curves) == 9 and not any("NaN" in curve for curve in curves)
    assert curves[0].count("M") == 2 and curves[0].count("L") == 57  # the skipped step leaves a gap
    assert document.count('class="mark"') == 1 + 6 + 1
    assert "note &lt;/script&gt;" in document
    assert "num_layers: 2" in document and "waiting for data 23.8%" in document


@needs_browser
def test_the_learning_rate_is_titled_with_its_schedule(tmp_path):
    """So that a bend that happens to be near a resume is not taken for one that the resume made."""
    run = make_run(tmp_path, 20)
    with open(run / "config.yaml", "a") as file:
        file.write("optim: {schedule: wsd, decay_fraction: 0.6}\n")
    assert "<h2>Learning rate (wsd: falls over the last 60%)</h2>" in drawn(report(run))
    assert schedule({"optim": {"schedule": "cosine"}}) == "(cosine)"
    assert schedule({}) == schedule({"optim": None}) == schedule({"optim": {"schedule": 3}}) == ""


@needs_browser
@pytest.mark.parametrize("num_steps", [0, 1])
def test_a_browser_draws_a_run_of_few_steps(tmp_path, num_steps):
    document = drawn(report(make_run(tmp_path, num_steps)))
    assert 'data-drawn="' in document and "NaN" not in document
    assert ("No steps recorded yet" in document) == (num_steps == 0)


def test_the_page_fetches_nothing(tmp_path):
    page = report(make_run(tmp_path, 20)).read_text()
    references = References()
    references.feed(page)
    assert references.found == []
    assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", page)
    assert "default-src 'none'" in page


def test_text_of_the_run_cannot_end_the_script(tmp_path):
    page = report(make_run(tmp_path, 5)).read_text()
    assert page.count("</script>") == 2
    embedded = re.search(r'id="data">(.*?)</script>', page).group(1)
    assert "</script><script>alert(1)" in json.loads(embedded)["events"][0]["detail"]


def test_a_long_run_gives_a_small_page_that_keeps_extremes_and_means(tmp_path):
    """Every interval keeps its mean and extremes, so no spike is lost."""
    run_dir = tmp_path / "long"
    run_dir.mkdir()
    values = [2 + math.sin(step) + (50 if step == 31_234 else 0) for step in range(1, 50_001)]
    time = "2026-01-01T00:00:00.000Z"
    rows = [
        {"step": step, "loss": value, "tokens": step, "heldout_loss": value, "time": time}
        for step, value in enumerate(values, start=1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "events.jsonl").write_text(
        "".join(json.dumps({"time": time, "kind": "save", "step": step}) + "\n" for step in range(5000))
        + json.dumps({"time": time, "kind": "skip", "step": 3}) + "\n"
    )  # fmt: skip
    data = collect(run_dir)
    loss = data["curves"]["loss"]
    assert len(loss["mean"]) == len(data["x"]["step"]) <= report_module.MAX_POINTS and data["x"]["step"][-1] == 50_000
    assert max(loss["max"]) == pytest.approx(max(values), rel=1e-5)
    assert min(loss["min"]) == pytest.approx(min(values), rel=1e-5)
    stretch = data["x"]["step"][0]
    assert loss["mean"][3] == pytest.approx(math.fsum(values[3 * stretch : 4 * stretch]) / stretch, rel=1e-5)
    assert len(data["heldout"]) <= report_module.MAX_POINTS and data["heldout"][-1][0] == 50_000
    assert [event["kind"] for event in data["events"]].count("skip") == 1
    assert report(run_dir).stat().st_size < 1_000_000


def add_life(run_dir):
    """Add two agents: one whose machine failed during the second start of the ranks, and one an hour later."""

    def start(from_s, to_s, first, done, ended, **seconds):
        steps = {"first": first, "done": done, "finished": done - first + 1}
        unfinished = {"forward": 2.0} if ended not in ("done", "saved") else {}
        return {"from_s": from_s, "to_s": to_s, "ended": ended, **steps, "seconds": seconds, "unfinished": unfinished}

    trained = {"data": 10.0, "exchange": 5.0, "forward": 60.0, "backward": 50.0, "update": 25.0, "waited": 15.0}
    first = [
        start(10, 200, 1, 20, "SIGKILL", start=30.0, save=10.0, **trained),
        start(210, 400, 16, 35, None, start=25.0, load=5.0, save=10.0, **trained),
    ]
    second = [start(10, 180, 31, 50, "done", start=5.0, load=5.0, evaluate=4.0, end=6.0, **trained)]
    agents = [
        {"began": 1e9, "seconds": 400.0, "starts": first},
        {"began": 1e9 + 4000, "seconds": 190.0, "starts": second},
    ]
    (run_dir / "ledger.json").write_text(json.dumps({"format": 1, "agents": agents}))


def test_the_page_adds_up_the_ledger(tmp_path):
    run_dir = make_run(tmp_path, 20)
    assert collect(run_dir)["life"] is None, "a run without an agent has no ledger"
    add_life(run_dir)
    data = collect(run_dir)
    life = data["life"]
    spent = dict(zip(life["categories"], life["seconds"], strict=True))
    kept = 15 * 148 / 20 + 15 * 148 / 20 + 150  # 15 of 20 steps each time, and all of the last ones
    assert spent["data"] + spent["compute"] + spent["communication"] == pytest.approx(kept, rel=1e-4)
    assert spent["lost work"] == pytest.approx(2 * (5 * 148 / 20 + 2), rel=1e-4)
    assert spent["downtime"] == 10 + 3600 and spent["start-up"] == 10 + 30 + 25 + 10 + 5 and spent["end"] == 16
    assert sum(spent.values()) == life["wall"] == 4190 and life["unbooked"] == 0
    assert life["text"] == (
        "goodput 8.9%: the share of 1:09:50 that went into steps which count · 3 starts of the ranks, 2 failures · "
        "mean time between failures 0:04:35 · 10 steps repeated"
    )
    assert data["tiles"][-1] == {"name": "goodput", "value": "8.9%", "note": "of 1:09:50"}
    assert [span["failed"] for span in life["spans"] if span["steps"]] == [True, True, False]


def test_idle_time_and_refused_commands_are_told_apart_from_failures(tmp_path):
    run_dir = make_run(tmp_path, 20)
    add_life(run_dir)
    before = collect(run_dir)["life"]["text"]
    document = json.loads((run_dir / "ledger.json").read_text())
    refused = {"from_s": 1.0, "to_s": 9.0, "ended": "exit code 2", "seconds": {"start": 8.0}, "unfinished": {}}
    document["agents"].append({"began": 1e9 + 4190 + 3590, "seconds": 10.0, "starts": [refused]})
    (run_dir / "ledger.json").write_text(json.dumps(document))
    life = collect(run_dir)["life"]
    assert life["text"] == before.replace(" · 3 starts", " · idle 1:00:00 more · 3 starts")
    assert dict(zip(life["categories"], life["seconds"], strict=True))["idle"] == 3600
    assert life["spans"][-1]["ended"] == "exit code 2" and life["spans"][-1]["steps"] is None


@needs_browser
def test_a_browser_draws_the_runs_ledger(tmp_path):
    run_dir = make_run(tmp_path, 20)
    add_life(run_dir)
    document = drawn(report(run_dir))
    assert "Where the run's time went</h2>" in document and "lost work 1.9%" in document and "NaN" not in document
    assert document.count('<path class="failure"') == 2
    starts = re.findall(r'<rect class="start" x="([\d.]+)"[^>]* width="([\d.]+)"', document)
    assert len(starts) == 6 + 7 + 7
    assert all(float(x) + float(width) <= 1200 for x, width in starts)
    assert len(re.findall(r'<rect class="between"', document)) == 5
    shares = re.search(r'<div class="share life">(.*?)</div>', document, flags=re.DOTALL)[1]
    assert sum(float(share) for share in re.findall(r"flex:([\d.e-]+) ", shares)) == pytest.approx(1.0, abs=0.01)


def test_a_damaged_ledger_is_reported(tmp_path):
    run_dir = make_run(tmp_path, 5)
    for text in ("{", '{"format": 1, "agents": [{"began": 3}]}'):
        (run_dir / "ledger.json").write_text(text)
        data = collect(run_dir)
        assert data["life"] is None and "ledger.json is damaged" in data["notices"][0]


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: no such folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(
        ConfigError, match=r"not the folder of a run \(it has none of metrics\.jsonl.*of a sweep.*of a prepared dataset"
    ):
        report(tmp_path)


def test_a_crashed_run_gives_a_page_of_its_records(tmp_path):
    run_dir = make_run(tmp_path, 12)
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_bytes(
        b"".join(lines[:8]) + b"\0\0\0\n" + b"".join(lines[8:]) + b'{"step": 13, "l'
    )
    (run_dir / "events.jsonl").unlink()
    (run_dir / "config.yaml").write_text("a: [")
    data = collect(run_dir)
    assert data["x"]["step"] == list(range(1, 9)) and data["config"] == "a: ["
    assert len(data["notices"]) == 2 and "line 9" in data["notices"][0]
    assert data["status"]["text"] == "no end recorded"


def test_a_run_whose_owner_is_alive_is_running(tmp_path):
    run_dir = make_run(tmp_path, 12)
    assert collect(run_dir)["status"]["text"] == "no end recorded"
    owner = Ownership.take(run_dir)
    assert re.fullmatch(r"running, last step (\d+ s|[\d:]+) ago", collect(run_dir)["status"]["text"])
    owner.release()
    assert collect(run_dir)["status"]["text"] == "no end recorded"
    (run_dir / "metrics.jsonl").unlink()
    Ownership.take(run_dir)
    assert collect(run_dir)["status"]["text"] == "running, no step yet"


def test_a_ledger_without_a_step_has_no_goodput(tmp_path):
    run_dir = make_run(tmp_path, 12)
    steps = {"first": 0, "done": 0, "finished": 0}
    begun = {"from_s": 1, "to_s": 20, "ended": None, **steps, "seconds": {"start": 19.0}, "unfinished": {}}
    agents = [{"began": 1e9, "seconds": 20.0, "starts": [begun]}]
    (run_dir / "ledger.json").write_text(json.dumps({"format": 1, "agents": agents}))
    data = collect(run_dir)
    assert "goodput" not in json.dumps(data["tiles"]) and "%" not in data["life"]["text"]


def test_the_numbers_at_the_top_match_the_run(tmp_path):
    run_dir = make_run(tmp_path, 60)
    EventLog(run_dir / "events.jsonl").emit("stop", 60, status="done")
    data = collect(run_dir)
    assert {tile["name"]: tile["value"] for tile in data["tiles"]} == {
        "step": "60",
        "tokens": "30.7k",
        "loss": "2.1000",
        "held-out loss": "2.6000",
        "bits per byte": "1.500",
        "tokens/s": "1.02k",
        "training time": "0:00:32",
    }
    assert data["time_spent"] == {"compute": 22.5, "data": 7.5, "eval": 1.5, "save": 0.0}
    assert data["status"] == {"text": "done", "tone": "good"}
    facts = dict(data["facts"])
    assert (facts["model"], facts["world size"], facts["steps planned"]) == ("tiny · 2 layers", "1", "300")
    assert (facts["resumes"], facts["steps skipped"]) == ("1", "1")


def test_a_score_of_a_part_of_the_held_out_data_says_so(tmp_path):
    run_dir = make_run(tmp_path, 60)
    assert "batches" not in json.dumps([collect(run_dir)["tiles"], collect(run_dir)["facts"]])
    events = EventLog(run_dir / "events.jsonl")
    events.emit("evaluate", 60, heldout_loss=2.6, num_batches=8, all_batches=108)
    data = collect(run_dir)
    (note,) = [tile["note"] for tile in data["tiles"] if tile["name"] == "held-out loss"]
    assert note.endswith(", first 8 of 108 batches")
    assert ["held-out loss is of", "the first 8 of 108 batches; megatrain evaluate reads all"] in data["facts"]
    events.emit("evaluate", 61, heldout_loss=2.6, num_batches=108, all_batches=108)
    assert "batches" not in json.dumps([collect(run_dir)["tiles"], collect(run_dir)["facts"]])


def test_engine_and_precision_are_said_once(tmp_path):
    run_dir = make_run(tmp_path, 5)
    with (run_dir / "config.yaml").open("a") as config:
        config.write("engine:\n  name: native\nprecision:\n  name: bf16\n")
    assert {("engine", "native"), ("precision", "bf16")} <= {tuple(row) for row in collect(run_dir)["facts"]}
    EventLog(run_dir / "events.jsonl").emit("resume", 5, layout="native dp=2 zero=3 bf16")
    names = [name for name, _ in collect(run_dir)["facts"]]
    assert "layout" in names and not {"engine", "precision"} & set(names)


def test_a_mixture_has_a_chart_of_its_sources_and_what_was_read_of_them(tmp_path):
    run_dir = make_run(tmp_path, 60)
    log, events = MetricsLog(run_dir / "metrics.jsonl"), EventLog(run_dir / "events.jsonl")
    for step in (70, 80):
        log.append({"step": step, "loss": 2.0, "heldout_loss": 3.0, "heldout_loss/web": 2.5, "heldout_loss/zh": 4.0})
    seen = {"web": {"share": 0.75, "epochs": 0.5}, "zh": {"share": 0.25, "epochs": 2.25}}
    events.emit("mixture", 80, sources=seen)
    page = collect(run_dir)
    assert [mark[3] for mark in page["heldout_by_source"]["zh"]] == [4.0, 4.0]
    assert ["read of each source", "web 75.0% (0.50 epochs), zh 25.0% (2.25 epochs)"] in page["facts"]


@needs_browser
def test_a_browser_draws_the_sources_of_a_mixture(tmp_path):
    run_dir = make_run(tmp_path, 60)
    log = MetricsLog(run_dir / "metrics.jsonl")
    for step in (70, 80):
        log.append({"step": step, "loss": 2.0, "heldout_loss/web": 2.5, "heldout_loss/zh": 4.0})
    document = drawn(report(run_dir))
    assert "<h2>Held-out loss by source" in document
    assert re.search(r'data-drawn="(\d+)"', document).group(1) == "11"


def test_weights_taken_from_another_run_are_told_in_words(tmp_path):
    run_dir = make_run(tmp_path, 5)
    EventLog(run_dir / "events.jsonl").emit("init_from", 0, checkpoint="runs/a/step_9", drawn=["head", "embed"])
    page = collect(run_dir)
    told = "runs/a/step_9; drawn anew: head, embed"
    assert ["weights taken from", told] in page["facts"]
    assert [event["detail"] for event in page["events"] if event["kind"] == "init_from"] == [told]


@needs_browser
@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("mfu", [None, 0.4])
def test_charts_fill_the_width_of_the_page_and_the_height_of_their_row(tmp_path, mixture, mfu):
    run_dir = make_run(tmp_path, 20)
    sources = {"heldout_loss/web": 2.5, "heldout_loss/zh": 4.0} if mixture else {}
    MetricsLog(run_dir / "metrics.jsonl").append({"step": 30, "loss": 2.0, "mfu": mfu, **sources})
    cards, charts = measured(
        report(run_dir),
        f"['.fills', '.fills svg'].map(which => [...document.querySelectorAll(which)].map({BOX}))",
    )
    assert len(cards) == len(charts) == 5 + mixture + bool(mfu)
    left, right = min(box[0] for box in cards), max(box[2] for box in cards)
    for row in rows_of(cards):
        assert (row[0][0], row[-1][2]) == pytest.approx((left, right), abs=0.5), "no half of a row is empty"
    for card, chart in zip(cards, charts, strict=True):
        assert 0 <= card[3] - chart[3] <= 12, "the axis is at the bottom of its card"


@needs_browser
@pytest.mark.parametrize("width", [500, 600, 800, 1200])
def test_no_tile_is_alone_in_a_row(tmp_path, width):
    tiles = measured(report(make_run(tmp_path, 20)), f"[...document.querySelectorAll('.tile')].map({BOX})", width)
    rows = rows_of(tiles)
    assert len(tiles) == 7 and max(map(len, rows)) - min(map(len, rows)) <= 1
    assert len({round(row[-1][2]) for row in rows}) == 1, "each row is as wide as the page"


def test_the_tokens_of_conversations_are_those_that_count(tmp_path):
    """Also where the config does not say that the data are conversations; then the card of the dataset does."""
    run_dir = make_run(tmp_path, 20)
    split = SplitCard(1, 9, 3, "uint16", 6, 50, "", [], loss_hashes=["00"])
    (tmp_path / "talks").mkdir()
    Card("talks", fingerprint({"train": split}), {"train": split}, None).save(tmp_path / "talks")
    found = {}
    for kind, name in (("files", "gone"), ("chat", "gone"), ("files", "talks")):
        config = {"data": {"kind": kind, "dir": str(tmp_path), "name": name}}
        (run_dir / "config.yaml").write_text(json.dumps(config))
        data = collect(run_dir)
        (note,) = [tile["note"] for tile in data["tiles"] if tile["name"] == "tokens"]
        assert note == data["in_loss"]
        found[kind, name] = note
    told = "that count in the loss"
    assert found == {("files", "gone"): "", ("chat", "gone"): told, ("files", "talks"): told}


@needs_browser
def test_a_chart_says_that_the_tokens_are_those_that_count(tmp_path):
    run_dir = make_run(tmp_path, 20)
    assert "<h2>Tokens per second</h2>" in drawn(report(run_dir))
    (run_dir / "config.yaml").write_text(json.dumps({"data": {"kind": "chat"}}))
    assert "<h2>Tokens per second that count in the loss</h2>" in drawn(report(run_dir))

"""`megatrain report <run>`: a run's folder to one HTML page that needs nothing else, no network either. Imports no torch.

Here the folder is read and cut down to what a page can show; report_page.py holds the page's style and script.
"""

from __future__ import annotations

import html
import json
import math
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from megatrain.errors import ConfigError, DataError
from megatrain.report.page import PAGE
from megatrain.report.pipeline_section import pipeline
from megatrain.resilience.ledger import CATEGORIES, DAMAGE, FILE, Summary, read_ledger, summarise
from megatrain.tracking.console import clock, short
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import iter_metrics, to_json

MAX_POINTS = 1200
"""Points of a curve; a longer run shows the mean of each stretch, with its smallest and largest value as a band."""
MAX_EVENTS_OF_A_KIND = 400
CURVES = ("loss", "grad_norm", "lr", "tokens_per_s", "mfu", "loss_scale", "step_time_s")
PARTS = ("data_time_s", "eval_time_s", "save_time_s")
"""Waiting for data is part of `step_time_s`, whose rest is computing; evaluating and saving come on top."""


def report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the page of the run in `run_dir` to `out` (default `<run_dir>/report.html`) and returns its path.

    A run that is going on, ended badly or has not begun gives a page of what there is. Raises ConfigError where
    `run_dir` is not a run's folder.
    """
    names = ("metrics.jsonl", "events.jsonl", "config.yaml")
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir}: no such folder; `megatrain report` takes a run's folder, runs/<run.name>")
    if not any((run_dir / name).exists() for name in names):
        raise ConfigError(f"{run_dir}: not a run's folder, it holds none of {', '.join(names)}")
    return write_page(PAGE, collect(run_dir), out or run_dir / "report.html")


def write_page(template: str, data: dict[str, Any], out: Path) -> Path:
    """Put data, whose `name` is the title, into a page of report_page.py and write that to `out`, which is returned."""
    embedded = to_json(data).replace("<", "\\u003c")  # no text of the run can end the script element
    page = template.replace("{{title}}", html.escape(data["name"])).replace("{{data}}", embedded)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    draft.write_text(page, encoding="utf-8")
    os.replace(draft, out)
    return out


def collect(run_dir: Path) -> dict[str, Any]:
    """All that the page shows, as plain JSON."""
    events = read_events(run_dir / "events.jsonl") if (run_dir / "events.jsonl").exists() else []
    config_path = run_dir / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.exists() else ""
    curves = Curves(run_dir / "metrics.jsonl")
    notices = [curves.damage] if curves.damage else []
    config: Any = {}
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        notices.append("config.yaml cannot be read as YAML.")
    moments = [*curves.times[:1], *(seconds(event.get("time")) for event in events)]
    first = min((moment for moment in moments if not math.isnan(moment)), default=0.0)
    checkpoints = sorted(path.parent.name for path in run_dir.glob("checkpoints/step_*/manifest.json"))
    shown_events = [
        {
            "kind": str(event["kind"]),
            "step": event.get("step"),
            "time": seconds(event.get("time")) - first,
            "detail": details(event),
        }
        for event in thin(events)
    ]
    config = config if isinstance(config, dict) else {}
    life = None
    if (run_dir / FILE).exists():
        try:
            life = summarise(read_ledger(run_dir / FILE))
        except (OSError, *DAMAGE):
            notices.append(f"{FILE} is damaged: where the run's time went is not known.")
    return {
        "name": run_dir.resolve().name,
        "status": status(events, curves),
        "tiles": tiles(curves, events, life),
        "facts": facts(config, events, curves, checkpoints),
        "pipeline": pipeline(config, events),
        "x": {"step": curves.steps, "time": [time - first for time in curves.times], "tokens": curves.tokens},
        "curves": curves.curves,
        "heldout": [[step, time - first, tokens, value] for step, time, tokens, value in curves.heldout],
        "time_spent": curves.time_spent(),
        "life": life_shown(life) if life and life.wall_s else None,
        "events": shown_events,
        "config": config_text,
        "notices": notices,
    }


class Curves:
    """metrics.jsonl, cut down to at most `max_points` points a curve while it is read: memory does not grow with the
    run. A point stands for a stretch of steps and carries the last step's number, time and tokens."""

    def __init__(self, path: Path, max_points: int = MAX_POINTS) -> None:
        self.max_points = max_points
        self.steps: list[int] = []
        self.times: list[float] = []
        self.tokens: list[int | None] = []
        self.curves: dict[str, dict[str, list[float | None]]] = {}
        self.heldout: list[tuple[int, float, int | None, float]] = []
        self.totals = dict.fromkeys(("step_time_s", *PARTS), 0.0)
        self.rates: dict[str, tuple[float, int]] = {"tokens_per_s": (0.0, 0), "mfu": (0.0, 0)}
        self.num_steps = self.num_skipped = 0
        self.last: dict[str, Any] = {}
        self.last_loss: float | None = None
        self.damage = ""
        if path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        with open(path, "rb") as file:
            lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        stretch = max(1, math.ceil(lines / self.max_points))
        bucket: dict[str, list[float]] = {}
        filled = 0
        try:
            for record in iter_metrics(path):
                self._note(record)
                for name in (*CURVES, *PARTS):
                    if is_number(record.get(name)):
                        bucket.setdefault(name, []).append(record[name])
                filled += 1
                if filled == stretch:
                    self._close(bucket, stretch)
                    bucket, filled = {}, 0
        except DataError as error:
            self.damage = f"Only what precedes a damaged line is shown. {error}"
        if filled:
            self._close(bucket, stretch)
        every = max(1, math.ceil(len(self.heldout) / self.max_points))
        self.heldout = self.heldout[::-every][::-1]  # the last one always stays

    def _note(self, record: dict[str, Any]) -> None:
        self.last = record
        self.num_steps += 1
        self.num_skipped += record.get("updated") is False
        if is_number(record.get("loss")):
            self.last_loss = record["loss"]
        if is_number(record.get("heldout_loss")):
            moment = seconds(record.get("time"))
            self.heldout.append((record["step"], moment, record.get("tokens"), record["heldout_loss"]))
        for name in ("step_time_s", *PARTS):
            self.totals[name] += record[name] if is_number(record.get(name)) else 0.0
        for name, (total, count) in self.rates.items():
            if is_number(record.get(name)):
                self.rates[name] = (total + record[name], count + 1)

    def _close(self, bucket: dict[str, list[float]], stretch: int) -> None:
        self.steps.append(self.last["step"])
        self.times.append(seconds(self.last.get("time")))
        self.tokens.append(self.last.get("tokens"))
        for name in (*CURVES, *PARTS):
            if name not in bucket and name not in self.curves:
                continue
            empty: list[float | None] = [None] * (len(self.steps) - 1)
            curve = self.curves.setdefault(
                name, {kind: list(empty) for kind in (("mean", "min", "max") if stretch > 1 else ("mean",))}
            )
            values = bucket.get(name)
            for kind, points in curve.items():
                points.append(None if values is None else digits(reduce_to(kind, values)))

    def time_spent(self) -> dict[str, float]:
        """Seconds of all steps by what they went to."""
        total = self.totals
        return {
            "compute": max(0.0, total["step_time_s"] - total["data_time_s"]),
            "data": total["data_time_s"],
            "eval": total["eval_time_s"],
            "save": total["save_time_s"],
        }


def reduce_to(kind: str, values: list[float]) -> float:
    """The mean, min or max of `values`."""
    return {"mean": lambda: math.fsum(values) / len(values), "min": lambda: min(values), "max": lambda: max(values)}[
        kind
    ]()


def tiles(curves: Curves, events: list[dict[str, Any]], life: Summary | None = None) -> list[dict[str, str]]:
    """The few numbers at the top of the page."""
    found = []
    if curves.last:
        found.append(("step", f"{curves.last['step']:,}", ""))
        if is_number(curves.last.get("tokens")):
            found.append(("tokens", short(curves.last["tokens"]), ""))
    if curves.last_loss is not None:
        found.append(("loss", f"{curves.last_loss:.4f}", "last step"))
    if curves.heldout:
        best = min(value for *_, value in curves.heldout)
        found.append(("held-out loss", f"{curves.heldout[-1][3]:.4f}", f"best {best:.4f}"))
    for event in reversed(events):
        if is_number(event.get("bits_per_byte")):
            found.append(("bits per byte", f"{event['bits_per_byte']:.3f}", f"at step {event.get('step')}"))
            break
    rates = {name: curves.rates[name] for name in curves.rates if curves.rates[name][1]}
    if "tokens_per_s" in rates:
        total, count = rates["tokens_per_s"]
        mfu = "mfu {:.1%}".format(rates["mfu"][0] / rates["mfu"][1]) if "mfu" in rates else "mean"
        found.append(("tokens/s", short(total / count), mfu))
    spent = sum(curves.time_spent().values())
    if spent:
        goodput = f"goodput {life.goodput:.1%}" if life and life.wall_s else ""
        found.append(("training time", long_time(spent), goodput))
    return [dict(zip(("name", "value", "note"), tile, strict=True)) for tile in found]


def life_shown(life: Summary) -> dict[str, Any]:
    """The goodput ledger, for the page."""
    seconds = life.seconds
    unbooked = life.wall_s - sum(seconds.values())
    effective = f"effective training time {life.goodput:.1%} of {long_time(life.wall_s)}"
    starts = counted(life.num_starts, "start") + f" of the ranks, {counted(life.failures, 'failure')}"
    mtbf = [f"mean time between failures {long_time(life.mtbf_s)}"] if life.mtbf_s is not None else []
    lost = [f"{counted(life.lost_steps, 'step')} done again"] if life.lost_steps else []
    return {
        "text": " · ".join([effective, starts, *mtbf, *lost]),
        "wall": digits(life.wall_s),
        "categories": list(CATEGORIES),
        "seconds": [digits(seconds[name]) for name in CATEGORIES],
        "unbooked": digits(unbooked) if abs(unbooked) > 0.01 * life.wall_s else 0.0,
        "spans": [
            {
                "from": digits(span.start_s),
                "to": digits(span.stop_s),
                "parts": [[name, digits(span.seconds[name])] for name in CATEGORIES if span.seconds.get(name)],
                "steps": list(span.steps) if span.steps else None,
                "ended": span.ended,
                "failed": span.failed,
            }
            for span in life.spans
        ],
    }


def counted(number: int, what: str) -> str:
    """A number of things."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def long_time(spent: float) -> str:
    """Seconds as people write them, however many."""
    return clock(spent) if spent < 86400 else f"{spent / 86400:.1f} days"


def facts(
    config: dict[str, Any], events: list[dict[str, Any]], curves: Curves, checkpoints: list[str]
) -> list[list[str]]:
    """Rows of the summary table: what ran where, from the config and the last start's event."""

    def of(*path: str) -> Any:
        value: Any = config
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    model = ", ".join(
        f"{of('model', name)} {word}"
        for name, word in (("num_layers", "layers"), ("hidden_size", "wide"), ("num_heads", "heads"))
        if of("model", name) is not None
    )
    starts = [event for event in events if event["kind"] in ("start", "resume")]
    rows: list[tuple[str, Any]] = [
        ("model", " · ".join(str(part) for part in (of("model", "name"), model) if part)),
        ("data", of("data", "name")),
        ("engine", of("engine", "name")),
        ("precision", of("precision", "name")),
        ("sequences a step", of("train", "global_batch_size")),
        ("tokens a sequence", of("train", "seq_len")),
        ("steps planned", of("train", "steps")),
        ("learning rate", of("optim", "lr")),
        ("seed", of("seed")),
    ]
    merged: dict[str, Any] = {}
    for event in starts:
        merged |= {name: value for name, value in event.items() if name not in ("time", "kind", "step", "cut_metrics")}
    rows += [(name.replace("_", " "), plain(value)) for name, value in merged.items()]
    rows.append(("started", starts[0].get("time") if starts else None))
    rows.append(("last step written", curves.last.get("time")))
    rows.append(("resumes", sum(event["kind"] == "resume" for event in events) or None))
    rows.append(("steps skipped", curves.num_skipped or None))
    rows.append(("checkpoints on disk", ", ".join(checkpoints[-6:])))
    return [[name, str(value)] for name, value in rows if value not in (None, "")]


def status(events: list[dict[str, Any]], curves: Curves) -> dict[str, str]:
    """How the run stands, as far as the folder tells: a run that was killed cannot say so."""
    last = next((event for event in reversed(events) if event["kind"] in ("stop", "start", "resume")), None)
    if last is not None and last["kind"] == "stop":
        how = str(last.get("status") or last.get("reason") or "ended")
        return {"text": how, "tone": "good" if how == "done" else "bad" if how == "failed" else "plain"}
    if not curves.last:
        return {"text": "no step yet", "tone": "plain"}
    return {"text": "no end recorded", "tone": "plain"}


def thin(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events in order, of a frequent kind an even selection."""
    kinds: dict[str, list[int]] = {}
    for index, event in enumerate(events):
        kinds.setdefault(str(event["kind"]), []).append(index)
    kept = [indices[:: math.ceil(len(indices) / MAX_EVENTS_OF_A_KIND)] for indices in kinds.values()]
    return [events[index] for index in sorted(index for chosen in kept for index in chosen)]


def details(event: dict[str, Any]) -> str:
    """What an event carries beside time, kind and step, as one line of text."""
    parts = (f"{name} {plain(value)}" for name, value in event.items() if name not in ("time", "kind", "step"))
    return ", ".join(parts)[:400]


def plain(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value if isinstance(value, str) else json.dumps(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def digits(value: float) -> float:
    """Six significant digits: what a picture shows, in a page that stays small."""
    return float(f"{value:.6g}")


def seconds(time: Any) -> float:
    """ISO 8601 to seconds since 1970; NaN where it is missing or not a time."""
    try:
        return datetime.fromisoformat(str(time).replace("Z", "+00:00")).timestamp()
    except ValueError:
        return math.nan

"""`megatrain report <run>`: turn a run's folder into one self-contained HTML page. Imports no torch.

This module reads the folder and reduces it to what a page can show. `page.py` assembles the page.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import yaml

from megatrain.config.plain import plain
from megatrain.data.card import CARD
from megatrain.errors import ConfigError, DataError
from megatrain.report.lineage_section import lineage
from megatrain.report.page import RUN_PAGE, write_page
from megatrain.report.pipeline_section import pipeline
from megatrain.report.scores_page import scores_of_run
from megatrain.report.sources import last_read, reads_conversations, sources_of_run
from megatrain.resilience.failure import seconds_of
from megatrain.resilience.ledger import CATEGORIES, DAMAGE, FILE, Summary, read_ledger, summarise
from megatrain.resilience.owner import is_held
from megatrain.tracking.console import clock, short
from megatrain.tracking.event_words import SOURCE_LOSS, change, describe_sources, details, part_read
from megatrain.tracking.events import read_events
from megatrain.tracking.metrics import iter_metrics
from megatrain.tracking.sweep_record import FILE as FILE_OF_SWEEP

MAX_POINTS = 1200
"""Most points per curve. A longer run is cut into stretches, each shown as its mean and a min-max band."""
MAX_EVENTS_OF_A_KIND = 400
"""Most events of one kind that the page shows."""
MAX_DETAIL = 400
"""Most characters of an event's detail."""
RECORDS = ("metrics.jsonl", "events.jsonl", "config.yaml")
"""The files that a page is made of; a run's folder has one at least."""
REWARDS = (
    "reward",
    "heldout_reward",
    "reply_tokens",
    "stop_rate",
    "entropy",
    "groups_without_signal",
    "kl",
    "log_prob_difference",
)
"""Curves of a run that learns from rewards."""
VALUES = ("value_loss", "explained_variance")
"""Curves of a run that learns values too."""
CURVES = ("loss", "grad_norm", "lr", "tokens_per_s", "mfu", "loss_scale", "step_time_s", *REWARDS, *VALUES)
IN_LOSS = "that count in the loss"
"""Which tokens the numbers of a run are of that reads conversations."""
PARTS = ("data_time_s", "eval_time_s", "save_time_s")
"""Parts of the run's time. `step_time_s` includes waiting for data, but not evaluating or saving."""


def report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of the run in `run_dir` to `out` (default `<run_dir>/report.html`) and return its path.

    For a run that has not begun, is still running or has failed, the page shows the data so far.

    Raises:
        ConfigError: `run_dir` is not a run's folder.
    """
    if not run_dir.is_dir():
        raise ConfigError(
            f"{run_dir}: no such folder; `megatrain report` takes the folder of a run (runs/<run.name>), of a sweep "
            "or of a prepared dataset (data/<data.name>)"
        )
    if not any((run_dir / name).exists() for name in RECORDS):
        found = sorted(str(path.parent) for name in (RECORDS[0], FILE_OF_SWEEP) for path in run_dir.glob(f"*/{name}"))
        listed = f"; such folders in it: {', '.join(found[:8])}{', ...' * (len(found) > 8)}" if found else ""
        raise ConfigError(
            f"{run_dir}: not the folder of a run (it has none of {', '.join(RECORDS)}), of a sweep (no "
            f"{FILE_OF_SWEEP}) or of a prepared dataset (no {CARD}){listed}"
        )
    return write_page(RUN_PAGE, collect(run_dir), out or run_dir / "report.html")


def collect(run_dir: Path) -> dict[str, Any]:
    """Return everything that the page shows, ready for JSON."""
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
            "detail": details(event)[:MAX_DETAIL],
        }
        for event in thin_out(events)
    ]
    config = config if isinstance(config, dict) else {}
    in_loss = IN_LOSS if reads_conversations(config) else ""
    life = None
    if (run_dir / FILE).exists():
        try:
            life = summarise(read_ledger(run_dir / FILE))
        except (OSError, *DAMAGE):
            notices.append(f"{FILE} is damaged, so the page cannot show where the run's time went.")
    return {
        "name": run_dir.resolve().name,
        "status": status(run_dir, events, curves),
        "tiles": tiles(curves, events, life, in_loss),
        "in_loss": in_loss,
        "schedule": schedule(config),
        "facts": facts(config, events, curves, checkpoints),
        "pipeline": pipeline(config, events),
        "x": {"step": curves.steps, "time": [time - first for time in curves.times], "tokens": curves.tokens},
        "curves": curves.curves,
        "heldout": marks(curves.heldout, first),
        "heldout_by_source": {name: marks(found, first) for name, found in curves.heldout_by_source.items()},
        "sources": sources_of_run(config, events),
        "scores": scores_of_run(run_dir),
        "lineage": boxes if len(boxes := lineage(run_dir)) > 1 else [],
        "time_spent": curves.time_spent(),
        "life": describe_life(life) if life and life.wall_s else None,
        "events": shown_events,
        "config": config_text,
        "notices": notices,
    }


def marks(found: list[tuple[int, float, int | None, float]], first: float) -> list[list[Any]]:
    """Return held-out losses as the page draws them: step, seconds since `first`, tokens, value."""
    return [[step, time - first, tokens, value] for step, time, tokens, value in found]


class Curves:
    """metrics.jsonl, reduced to at most `max_points` points per curve.

    The file is reduced while it is read, so memory does not grow with the run. A point stands for a stretch of steps
    and carries the number, time and tokens of the last of them.
    """

    def __init__(self, path: Path, max_points: int = MAX_POINTS) -> None:
        self.max_points = max_points
        self.steps: list[int] = []
        self.times: list[float] = []
        self.tokens: list[int | None] = []
        self.curves: dict[str, dict[str, list[float | None]]] = {}
        self.heldout: list[tuple[int, float, int | None, float]] = []
        self.heldout_by_source: dict[str, list[tuple[int, float, int | None, float]]] = {}
        self.totals = dict.fromkeys(("step_time_s", *PARTS), 0.0)
        self.rates: dict[str, tuple[float, int]] = {"tokens_per_s": (0.0, 0), "mfu": (0.0, 0)}
        self.num_steps = self.num_skipped = 0
        self.last: dict[str, Any] = {}
        self.last_loss: float | None = None
        self.last_reward: float | None = None
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
            self.damage = f"The page shows only the steps before a damaged line. {error}"
        if filled:
            self._close(bucket, stretch)
        every = max(1, math.ceil(len(self.heldout) / self.max_points))
        self.heldout = self.heldout[::-every][::-1]  # always keeps the last one
        self.heldout_by_source = {name: found[::-every][::-1] for name, found in self.heldout_by_source.items()}

    def _note(self, record: dict[str, Any]) -> None:
        self.last = record
        self.num_steps += 1
        self.num_skipped += record.get("updated") is False
        if is_number(record.get("loss")):
            self.last_loss = record["loss"]
        if is_number(record.get("reward")):
            self.last_reward = record["reward"]
        if is_number(record.get("heldout_loss")):
            moment = seconds(record.get("time"))
            self.heldout.append((record["step"], moment, record.get("tokens"), record["heldout_loss"]))
        for name in (name for name in record if name.startswith(SOURCE_LOSS) and is_number(record[name])):
            found = self.heldout_by_source.setdefault(name.removeprefix(SOURCE_LOSS), [])
            found.append((record["step"], seconds(record.get("time")), record.get("tokens"), record[name]))
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
                points.append(None if values is None else round_for_plot(reduce_to(kind, values)))

    def time_spent(self) -> dict[str, float]:
        """Return the seconds that all steps together spent on each part."""
        total = self.totals
        return {
            "compute": max(0.0, total["step_time_s"] - total["data_time_s"]),
            "data": total["data_time_s"],
            "eval": total["eval_time_s"],
            "save": total["save_time_s"],
        }


def reduce_to(kind: str, values: list[float]) -> float:
    """Return the mean, min or max of `values`, as `kind` says."""
    if kind == "mean":
        return math.fsum(values) / len(values)
    return min(values) if kind == "min" else max(values)


def schedule(config: dict[str, Any]) -> str:
    """Return the learning rate's schedule for its title, so that its bends explain themselves; empty if unknown."""
    optim = config.get("optim")
    optim = optim if isinstance(optim, dict) else {}
    name = optim.get("schedule")
    if name == "wsd" and isinstance(share := optim.get("decay_fraction"), (int, float)):
        return f"({name}: falls over the last {share:.0%})"
    return f"({name})" if isinstance(name, str) else ""


def tiles(curves: Curves, events: list[dict[str, Any]], life: Summary | None, in_loss: str) -> list[dict[str, str]]:
    """Return the tiles at the top of the page. `in_loss` says which tokens were counted, empty if all."""
    found = []
    if curves.last:
        found.append(("step", f"{curves.last['step']:,}", ""))
        if is_number(curves.last.get("tokens")):
            found.append(("tokens", short(curves.last["tokens"]), in_loss))
    if curves.last_reward is not None:
        found.append(("reward", f"{curves.last_reward:.3f}", "last replies"))
    if curves.last_loss is not None:
        found.append(("loss", f"{curves.last_loss:.4f}", "last step"))
    if curves.heldout:
        best = min(value for *_, value in curves.heldout)
        read = part_read(last_evaluation(events))
        note = f"best {best:.4f}" + (f", {read}" if read else "")
        found.append(("held-out loss", f"{curves.heldout[-1][3]:.4f}", note))
    for event in reversed(events):
        if is_number(event.get("bits_per_byte")):
            found.append(("bits per byte", f"{event['bits_per_byte']:.3f}", f"at step {event.get('step')}"))
            break
    rates = {name: curves.rates[name] for name in curves.rates if curves.rates[name][1]}
    if "tokens_per_s" in rates:
        total, count = rates["tokens_per_s"]
        mfu = "mfu {:.1%}".format(rates["mfu"][0] / rates["mfu"][1]) if "mfu" in rates else "mean"
        found.append(("tokens/s", short(total / count), mfu))
    if life and life.busy_s and life.trained:
        found.append(("goodput", f"{life.goodput:.1%}", f"of {duration(life.busy_s)}"))
    elif spent := sum(curves.time_spent().values()):
        found.append(("training time", duration(spent), ""))
    return [dict(zip(("name", "value", "note"), tile, strict=True)) for tile in found]


def describe_life(life: Summary) -> dict[str, Any]:
    """Return the goodput ledger as the page shows it."""
    seconds = life.seconds
    unbooked = life.wall_s - sum(seconds.values())
    effective = (
        f"goodput {life.goodput:.1%}: the share of {duration(life.busy_s)} that went into steps which count"
        if life.trained
        else "no step yet"
    )
    idle = [f"idle {duration(seconds['idle'])} more"] if seconds["idle"] >= 0.5 else []
    starts = count_of(life.num_starts, "start") + f" of the ranks, {count_of(life.failures, 'failure')}"
    mtbf = [f"mean time between failures {duration(life.mtbf_s)}"] if life.mtbf_s is not None else []
    lost = [f"{count_of(life.lost_steps, 'step')} repeated"] if life.lost_steps else []
    return {
        "text": " · ".join([effective, *idle, starts, *mtbf, *lost]),
        "wall": round_for_plot(life.wall_s),
        "categories": list(CATEGORIES),
        "seconds": [round_for_plot(seconds[name]) for name in CATEGORIES],
        "unbooked": round_for_plot(unbooked) if abs(unbooked) > 0.01 * life.wall_s else 0.0,
        "spans": [
            {
                "from": round_for_plot(span.start_s),
                "to": round_for_plot(span.stop_s),
                "parts": [[name, round_for_plot(span.seconds[name])] for name in CATEGORIES if span.seconds.get(name)],
                "steps": list(span.steps) if span.steps else None,
                "ended": span.ended,
                "failed": span.failed,
            }
            for span in life.spans
        ],
    }


def count_of(number: int, what: str) -> str:
    """Return a count with its noun: `1 step`, `2,000 steps`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def duration(spent: float) -> str:
    """Return seconds as h:mm:ss, or as days from one day on."""
    return clock(spent) if spent < 86400 else f"{spent / 86400:.1f} days"


def facts(
    config: dict[str, Any], events: list[dict[str, Any]], curves: Curves, checkpoints: list[str]
) -> list[list[str]]:
    """Return the rows of the summary table, taken from the config, the events and the metrics."""

    def value_of(*path: str) -> Any:
        value: Any = config
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    model = ", ".join(
        f"{value_of('model', name)} {word}"
        for name, word in (("num_layers", "layers"), ("hidden_size", "wide"), ("num_heads", "heads"))
        if value_of("model", name) is not None
    )
    starts = [event for event in events if event["kind"] in ("start", "resume")]
    rows: list[tuple[str, Any]] = [
        ("model", " · ".join(str(part) for part in (value_of("model", "name"), model) if part)),
        ("data", value_of("data", "name")),
        ("engine", value_of("engine", "name")),
        ("precision", value_of("precision", "name")),
        ("sequences per step", value_of("train", "global_batch_size")),
        ("tokens per sequence", value_of("train", "seq_len")),
        ("steps planned", value_of("train", "steps")),
        ("learning rate", value_of("optim", "lr")),
        ("seed", value_of("seed")),
    ]
    merged: dict[str, Any] = {}
    for event in starts:
        merged |= {name: value for name, value in event.items() if name not in ("time", "kind", "step", "cut_metrics")}
    layout = str(merged.get("layout", ""))  # begins with the engine and ends with the precision
    rows = [row for row in rows if not (row[0] in ("engine", "precision") and str(row[1]) in layout.split())]
    rows += [(name.replace("_", " "), format_value(value)) for name, value in merged.items()]
    mixed = last_read(events)
    rows.append(("read of each source", describe_sources(mixed) if mixed else None))
    if read := part_read(last_evaluation(events)):
        rows.append(("held-out loss is of", f"the {read}; megatrain evaluate reads all"))
    rows.append(("weights taken from", next((details(e) for e in events if e["kind"] == "init_from"), None)))
    rows.append(("changed on a resume", changes(events)))
    rows.append(("started", starts[0].get("time") if starts else None))
    rows.append(("last step written", curves.last.get("time")))
    rows.append(("resumes", sum(event["kind"] == "resume" for event in events) or None))
    rows.append(("steps skipped", curves.num_skipped or None))
    rows.append(("checkpoints on disk", ", ".join(checkpoints[-6:])))
    return [[name, str(value)] for name, value in rows if value not in (None, "")]


def last_evaluation(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last event `evaluate`; empty if there is none."""
    return next((event for event in reversed(events) if event["kind"] == "evaluate"), {})


def changes(events: list[dict[str, Any]]) -> str:
    """Return what resumes changed on purpose (`checkpoint.override`), each once: `key before → now (step)`."""
    told = [
        f"{event['key']} {change(event['before'], event['now'])} (step {event['step']})"
        for event in events
        if event["kind"] == "change" and event.get("override")
    ]
    return "; ".join(dict.fromkeys(told))


def status(run_dir: Path, events: list[dict[str, Any]], curves: Curves) -> dict[str, str]:
    """Return the run's status as its folder records it. A killed run records no end; a running one has an owner."""
    last = next((event for event in reversed(events) if event["kind"] in ("stop", "start", "resume")), None)
    alive, last_step = is_held(run_dir), seconds(curves.last.get("time"))
    if last is not None and last["kind"] == "stop" and not alive:
        how = str(last.get("status") or last.get("reason") or "ended")
        return {"text": how, "tone": "good" if how == "done" else "bad" if how == "failed" else "plain"}
    if not curves.last:
        return {"text": "running, no step yet" if alive else "no step yet", "tone": "plain"}
    if not alive:
        return {"text": "no end recorded", "tone": "plain"}
    ago = max(0.0, time.time() - last_step)
    when = "" if math.isnan(ago) else f", last step {f'{ago:.0f} s' if ago < 60 else clock(ago)} ago"
    return {"text": f"running{when}", "tone": "plain"}


def thin_out(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events in order, at most `MAX_EVENTS_OF_A_KIND` of each kind, evenly spaced."""
    kinds: dict[str, list[int]] = {}
    for index, event in enumerate(events):
        kinds.setdefault(str(event["kind"]), []).append(index)
    kept = [indices[:: math.ceil(len(indices) / MAX_EVENTS_OF_A_KIND)] for indices in kinds.values()]
    return [events[index] for index in sorted(index for chosen in kept for index in chosen)]


def format_value(value: Any) -> str:
    """Return a value as the page shows it: integers with separators, the rest in plain words."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return plain(value, 6)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def round_for_plot(value: float) -> float:
    """Round to six significant digits: enough for a plot, and the page stays small."""
    return float(f"{value:.6g}")


def seconds(time: Any) -> float:
    """Convert ISO 8601 to seconds since 1970; NaN where the time is missing or malformed."""
    try:
        return seconds_of(str(time))
    except ValueError:
        return math.nan
